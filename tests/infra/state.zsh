# Prints all that a shell has: options, traps, folder, functions, aliases, open files, positional parameters, variables.
state() {
  setopt; trap; pwd; echo /proc/$$/fd/*; print -l ${(ok)functions}; alias; echo "$#:$*"
  typeset -p | grep -vE '^(typeset|export|integer|float)[^=]* (_|status|LINENO|RANDOM|SECONDS|EPOCH[A-Z]*|'\
'TTYIDLE|funcstack|pipestatus|options|parameters|commands|historywords|history|jobdirs|jobstates|jobtexts|'\
'functions[a-z_]*|ZSH_EVAL_CONTEXT|zsh_eval_context|COLUMNS|LINES|\?)(=|$)'
}
