#!/usr/bin/env bash
#
# Sets a Google Cloud project up for ddpm jobs, or this machine alone; doing it again changes nothing that is right.
#
#   source ./setup.sh --project my-project --region us-central1     # and DDPM_BUCKET and DDPM_TARGETS are set here
#   ./setup.sh --project my-project --dry-run                       # prints every command, runs none
#   ./setup.sh --local                                              # a local bucket and the embedded images, no cloud
#
#   --project ID         Google Cloud project; default: the one gcloud is set to
#   --region NAME        where everything is made; default: us-central1
#   --name NAME          what the names of all that is made begin with; default: ddpm
#   --gke                with a GKE cluster, whose system node costs money day and night
#   --landscape SOURCE   pack Kaggle's archive.zip as the dataset landscape: a path, or an https:// or gs:// URI
#   --celeba SOURCE      pack img_align_celeba.zip as the dataset celeba
#   --checkpoints URI    copy an example run (a folder …/runs/NAME) into the bucket
#   --no-image           do not build and push the container image
#   --infra-only         only the infrastructure and targets.yaml: `make infra`
#   --plan               print Terraform's plan, and make no more than the bucket for its state
#   --destroy            remove all but the buckets: `make infra-destroy`
#   --allow-destroy      let a plan be applied that removes something
#   --yes                do not ask
#   --local              no cloud: ./bucket, the embedded dataset, targets.yaml
#   --dry-run            print the commands, run none
#   --help
#
# Ends with 2 for wrong usage, 66 for a missing tool or file, 77 without credentials, else with the failed command's code.

if [ -z "${BASH_VERSION:-}${ZSH_VERSION:-}" ]; then
  echo "setup.sh: use bash: source it in bash or zsh, or run ./setup.sh" >&2
  # shellcheck disable=SC2317 # reached where the file is run and not sourced
  return 2 2>/dev/null || exit 2
fi

# Sourced, the work is done by a process of its own, so that nothing of it stays in this shell but two variables.
_ddpm_setup() {
  local file answer code=0
  if [ -n "${ZSH_VERSION:-}" ]; then
    eval 'file=${(%):-%x}'
  else
    file=${BASH_SOURCE[0]}
  fi
  unset -f _ddpm_setup
  { answer=$(DDPM_SETUP_ANSWER=3 command bash "$file" "$@" 3>&1 1>&4) || code=$?; } 4>&1
  if [ "$code" = 0 ] && [ -n "$answer" ]; then
    export DDPM_BUCKET="${answer%%$'\n'*}" DDPM_TARGETS="${answer#*$'\n'}"
  fi
  return "$code"
}
if [ -n "${ZSH_VERSION:-}" ]; then
  case ${ZSH_EVAL_CONTEXT:-} in *:file*) _ddpm_setup "$@" || return $?; return 0 ;; esac
  exec bash "$0" "$@"
elif [ "${BASH_SOURCE[0]}" != "$0" ]; then
  _ddpm_setup "$@" || return $?
  return 0
fi
unset -f _ddpm_setup

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
readonly root here=$PWD terraform_folder=$root/infra/terraform ddpm=$root/.venv/bin/ddpm
readonly for_answer=${DDPM_SETUP_ANSWER:-}
unset DDPM_SETUP_ANSWER
project='' region='' name=ddpm gke=0 landscape='' celeba='' checkpoints='' image=1 infra_only=0 plan_only=0 destroy=0
allow_destroy=0 yes=0 local_only=0 dry_run=0 bucket='' doing='setting up' engine=podman

# Prints the comment above as help.
usage() { sed -n '3,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

say() { printf '%s\n' "$*"; }

fail() {
  local code=$1
  shift
  printf 'setup.sh: %s\n' "$*" >&2
  exit "$code"
}

begin() {
  doing=$1
  say "== $doing"
}

show() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
}

# Runs a command, or prints it. What fails is named with its step; the steps before it need no undoing.
run() {
  local code=0
  if ((dry_run)); then
    show "$@"
    return
  fi
  "$@" || code=$?
  ((code == 0)) || fail "$code" "$doing failed with code $code at: $(show "$@"). Run the same command again once that is mended: what is done already stays as it is."
}

parse() {
  local option
  while (($#)); do
    option=$1
    case $option in
      --project | --region | --name | --landscape | --celeba | --checkpoints)
        (($# > 1)) && [[ -n $2 && $2 != --* ]] || fail 2 "$option needs a value; --help shows all options"
        printf -v "${option#--}" '%s' "$2"
        shift
        ;;
      --gke) gke=1 ;;
      --no-image) image=0 ;;
      --infra-only) infra_only=1 ;;
      --plan) plan_only=1 infra_only=1 ;;
      --destroy) destroy=1 ;;
      --allow-destroy) allow_destroy=1 ;;
      --yes) yes=1 ;;
      --local) local_only=1 ;;
      --dry-run) dry_run=1 ;;
      -h | --help) usage && exit 0 ;;
      *) fail 2 "there is no option $option; --help shows them all" ;;
    esac
    shift
  done
  if ((local_only)) && [[ -n $project$region || $gke$destroy$infra_only != 000 ]]; then
    fail 2 "--local makes nothing in a cloud: leave out --project, --region, --gke, --infra-only, --plan and --destroy"
  fi
  [[ -z $region || $region =~ ^[a-z]+-[a-z]+[0-9]+$ ]] || fail 2 "--region $region: use a name such as us-central1"
  [[ -z $project || $project =~ ^[a-z][a-z0-9-]{4,28}[a-z0-9]$ ]] ||
    fail 2 "--project $project: use the project's ID, such as my-project-1234"
  [[ $name =~ ^[a-z][a-z0-9-]{1,10}[a-z0-9]$ ]] || fail 2 "--name $name: use 3 to 12 lower-case letters, digits and '-'"
  landscape=$(absolute "$landscape") celeba=$(absolute "$celeba") checkpoints=$(absolute "$checkpoints")
  check_there "$landscape" --landscape
  check_there "$celeba" --celeba
  check_there "$checkpoints" --checkpoints
}

# A path as it is meant in the folder where the command was typed; URIs stay as they are.
absolute() {
  case $1 in
    '' | /* | *://*) printf '%s' "$1" ;;
    *) printf '%s/%s' "$here" "$1" ;;
  esac
}

check_there() {
  [[ -z $1 || $1 == *://* || -e $1 ]] || fail 66 "$2: there is nothing at $1"
}

# shellcheck source=infra/google-cloud.sh
source "$root/infra/google-cloud.sh"

# need TOOL WHERE-IT-COMES-FROM …: names all that are missing at once.
need() {
  local missing=''
  while (($#)); do
    command -v "$1" >/dev/null || missing+=$'\n'"  $1: $2"
    shift 2
  done
  [[ -z $missing ]] || fail 66 "these programs are missing:$missing"
}

check_tools() {
  local -a tools=(
    make "your system's package manager has it"
    python3 "3.11 or newer, from your system's package manager or python.org"
  )
  if ((!local_only)); then
    tools+=(
      gcloud "https://cloud.google.com/sdk/docs/install"
      terraform "1.9 or newer: https://developer.hashicorp.com/terraform/install"
    )
  fi
  if ((gke && !destroy)); then
    tools+=(
      kubectl "gcloud components install kubectl"
      gke-gcloud-auth-plugin "gcloud components install gke-gcloud-auth-plugin"
    )
  fi
  if [[ $landscape$celeba == *http*://* ]]; then
    tools+=(curl "your system's package manager has it")
  fi
  if [[ $checkpoints == gs://* ]] && ((local_only)); then
    tools+=(gcloud "https://cloud.google.com/sdk/docs/install; or give --checkpoints a path")
  fi
  command -v podman >/dev/null || engine=docker
  if ((image && !local_only && !infra_only && !destroy)); then
    command -v "$engine" >/dev/null || tools+=("podman" "or docker, to build the image; or add --no-image")
  fi
  ((dry_run)) || need "${tools[@]}"
}

check_python() {
  ((dry_run)) || python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail 66 "python3 is older than 3.11: install a newer one and put it first on PATH"
}

# add_dataset NAME SOURCE ORIGINALS: packs a source unless the bucket has the dataset; keeps the original in the data bucket.
add_dataset() {
  local name=$1 source=$2 originals=$3 file
  [[ -n $source ]] || return 0
  begin "packing $source as $name"
  if ((!dry_run)) && "$ddpm" data ensure "$name" --bucket "$bucket" >/dev/null 2>&1; then
    say "it is in $bucket already"
    return
  fi
  if [[ $source == http://* || $source == https://* ]]; then
    file=${source%%[?#]*}
    file=$scratch/${file##*/}
    run curl --fail --location --retry 3 --output "$file" "$source"
    source=$file
  fi
  if [[ -n $originals && $source != *://* && ! -d $source ]]; then
    run gcloud storage cp --no-clobber "$source" "$originals/$name/"
  fi
  run "$ddpm" data pack "$source" "$name" --bucket "$bucket"
}

add_checkpoints() {
  local run_name
  checkpoints=${checkpoints%/}
  [[ -n $checkpoints ]] || return 0
  run_name=${checkpoints##*/}
  begin "copying the run $run_name"
  if [[ $bucket == gs://* || $checkpoints == *://* ]]; then
    run gcloud storage cp --recursive --no-clobber "$checkpoints" "$bucket/runs/"
  elif [[ -e $bucket/runs/$run_name ]]; then
    say "it is in $bucket already"
  else
    run mkdir -p "$bucket/runs"
    run cp -R "$checkpoints" "$bucket/runs/"
  fi
  run "$ddpm" runs verify "$run_name" --bucket "$bucket"
}

sum_of() { cksum | tr ' ' '-'; }

# Writes targets.yaml from the standard input; a file that a person has edited stays, and the new one lies beside it.
write_targets() {
  local text file=$root/targets.yaml first rest
  begin "writing $file"
  text=$(cat)
  if ((dry_run)); then
    say "(not written in a dry run)"
    return
  fi
  first="# Written by setup.sh ($(sum_of <<<"$text")). Edit it as you like: setup.sh then leaves it alone."
  if [[ -e $file ]]; then
    rest=$(tail -n +2 "$file")
    if [[ $(cat "$file") == "$first"$'\n'"$text" ]]; then
      say "it is there already"
      return
    elif [[ $(head -n 1 "$file") != *"($(sum_of <<<"$rest"))"* ]]; then
      file=$file.new
      printf 'setup.sh: targets.yaml was edited and stays as it is. What it would be now is in %s\n' "$file" >&2
    else
      say "replacing the one that an earlier set-up wrote"
    fi
  fi
  printf '%s\n%s\n' "$first" "$text" >"$scratch/targets" && run mv "$scratch/targets" "$file"
}

local_targets() {
  local quoted=${bucket//\'/\'\'}
  cat <<'EOF'
# Where jobs run: `ddpm submit train --dataset landscape-sample --on NAME`.
# docs/jobs.md shows what else there can be.
EOF
  printf "local:\n  bucket: '%s'\n\ncontainer:\n  bucket: '%s'\n  gpus: 0\n" "$quoted" "$quoted"
}

install() {
  begin "installing ddpm into .venv"
  local extras=google
  ((!gke)) || extras=google,kubernetes
  if ((local_only)); then run make -C "$root" setup; else run make -C "$root" setup "EXTRAS=$extras"; fi
}

main() {
  local data=''
  parse "$@"
  check_tools
  check_python
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  if ((local_only)); then
    bucket=$root/bucket
    install
    begin "packing the embedded images"
    run "$ddpm" data ensure landscape-sample --bucket "$bucket"
    local_targets | write_targets
  else
    check_account
    find_project
    if ((destroy)); then
      remove_infrastructure
      return
    fi
    make_infrastructure
    ((!plan_only)) || return 0
    # One a line: of two assignments in one command only the last may fail.
    bucket=$(output bucket "gs://$project-$name-runs")
    data=$(output data_bucket "gs://$project-$name-data")
    if ((!infra_only)); then
      bind_cluster
      install
      push_image
    fi
    cloud_targets >"$scratch/text"
    write_targets <"$scratch/text"
  fi
  if ((!infra_only)); then
    add_dataset landscape "$landscape" "$data"
    add_dataset celeba "$celeba" "$data"
    add_checkpoints
  fi
  say "== done"
  [[ -n $for_answer ]] || say "For this shell, or source ./setup.sh next time:"
  [[ -n $for_answer ]] || printf '  export DDPM_BUCKET=%q DDPM_TARGETS=%q\n' "$bucket" "$root/targets.yaml"
  done_with=$bucket$'\n'$root/targets.yaml
}

done_with=''
# No child may keep the answer's pipe open: the shell that sources this would wait for it.
main "$@" 3>&-
if [[ -n $for_answer && -n $done_with ]] && ((!dry_run)); then
  printf '%s\n' "$done_with" >&3
fi
