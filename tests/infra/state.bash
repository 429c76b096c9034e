# Prints all that a shell has: options, traps, folder, functions, aliases, open files, positional parameters, variables.
# shellcheck shell=bash
state() {
  set +o; shopt -p; trap -p; pwd; declare -F; alias; echo "$#:$*"; echo /proc/$$/fd/*
  declare -p | grep -vE '^declare -[^ ]* (_|PIPESTATUS|BASH_[A-Z]*|FUNCNAME|LINENO|S?RANDOM|SECONDS|EPOCH[A-Z]*)(=|$)'
}
