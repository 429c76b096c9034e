# Runs a job's container, once, on a VM of its own; says how it ended, and deletes the VM. Whoever watches the job
# submits it again.
#
# A constant, behind the exit codes that it names: what differs between jobs comes from metadata of the VM, which `vm.py`
# renders:
#   ddpm-words        of `docker run`, one a line
#   ddpm-environment  variables of the container, one a line
#   ddpm-image        to pull
#   ddpm-gpus         how many GPUs the driver is for; 0 needs none
#   ddpm-labels       of entries in Cloud Logging, as JSON
# shellcheck shell=bash disable=SC2154
# Far and wide there are only bash, coreutils, sed, curl and docker: this is Container-Optimized OS.
set -u

# What the VM knows of itself.
known() {
  curl --silent --fail --max-time 5 --retry 30 --retry-delay 2 --retry-all-errors --header 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/$1"
}

if [[ -z ${RUNTIME_DIRECTORY-} ]]; then
  # Again, in a unit of its own, which ends before docker and the network do, and has time to.
  script=$(mktemp)
  known instance/attributes/startup-script >"$script"
  exec systemd-run --unit=ddpm-job --property=RuntimeDirectory=ddpm --property=StateDirectory=ddpm \
    --property='After=network-online.target docker.socket docker.service' \
    --property=KillMode=mixed --property=TimeoutStopSec=40 \
    --property=StandardOutput=journal+console --property=StandardError=journal+console \
    /bin/bash "$script"
fi

# Sends a request with this machine's token, which curl reads from its input: arguments can be seen by others.
authorized() {
  known instance/service-accounts/default/token |
    sed -n 's/.*"access_token" *: *"\([^"]*\)".*/header = "Authorization: Bearer \1"/p' |
    curl --config - --silent --show-error --fail --retry 2 --max-time 10 --output /dev/null "$@"
}

# Leaves a MESSAGE on the console and in Cloud Logging, where it outlives the machine, with further FIELDS of JSON.
say() {
  local payload="\"message\": \"ddpm-vm: $1\"${2:+, $2}"
  printf 'ddpm-vm: %s\n' "$1"
  authorized --header 'Content-Type: application/json' https://logging.googleapis.com/v2/entries:write --data "{
    \"logName\": \"projects/$project/logs/ddpm-jobs\", \"resource\": {\"type\": \"global\"},
    \"entries\": [{\"labels\": $labels, \"jsonPayload\": {$payload}}]}"
}

# Says with which CODE the job ended, and deletes the machine, or switches it off where it may not delete itself.
end() {
  local machine
  trap '' TERM
  say "$2" "\"event\": \"${event:-ended}\", \"code\": $1"
  # One that is being taken away needs no help.
  [[ -z ${event-} ]] || exit 0
  machine=$(known instance/zone)/instances/$(known instance/name)
  if ! authorized --request DELETE "https://compute.googleapis.com/compute/v1/$machine"; then
    say "this machine may not delete itself (compute.instances.delete): it is switched off, and its disk costs money"
    systemctl poweroff
  fi
  exit 0
}

# Runs a command at most COUNT times, until it succeeds. In the background, for only so are signals heard meanwhile.
retry() {
  local attempt count=$1
  shift
  for ((attempt = 1; attempt <= count; attempt++)); do
    "$@" &
    wait $! && return
    ((attempt < count)) || return
    sleep $((attempt * 10)) &
    wait $!
  done
}

# Ends a command after so many SECONDS, whatever it makes of signals: a machine that hangs is paid for.
# shellcheck disable=SC2329 # `retry` calls it
within() { timeout --kill-after=10 "$@"; }

install_driver() {
  say "installing the GPU driver"
  retry 3 within 600 cos-extensions install gpu -- -version=latest &&
    # /var lets nothing be executed.
    mount --bind /var/lib/nvidia /var/lib/nvidia && mount -o remount,exec /var/lib/nvidia
}

pull() {
  local registry=${image%%/*}
  say "pulling $image"
  # Where docker keeps the credentials: root's home cannot be written.
  export HOME=$RUNTIME_DIRECTORY
  case $registry in
    *.pkg.dev | gcr.io | *.gcr.io) docker-credential-gcr configure-docker --registries="$registry" ;;
  esac
  retry 5 within 1200 docker pull --quiet "$image"
}

project=$(known project/project-id)
labels=$(known instance/attributes/ddpm-labels)
image=$(known instance/attributes/ddpm-image)
gpus=$(known instance/attributes/ddpm-gpus)
known instance/attributes/ddpm-environment >"$RUNTIME_DIRECTORY/environment"
mapfile -t words < <(known instance/attributes/ddpm-words)
chown 10001:10001 "$STATE_DIRECTORY"

trap 'event=taken; end "$stopped" "the machine was taken away before the job began"' TERM
log=(--log-driver=gcplogs '--log-opt=labels=ddpm-job,ddpm-slice')
if ! retry 3 say "started" '"event": "started"'; then
  echo "ddpm-vm: Cloud Logging takes nothing, as without roles/logging.logWriter: what the job prints stays on this machine"
  log=(--log-driver=local)
fi
if ((gpus)); then
  install_driver || end "$bucket_away" "the GPU driver could not be installed; the serial console says why"
fi
pull || end "$missing_input" "the image $image could not be pulled: check its name, and that this machine's account has \
roles/artifactregistry.reader"

docker run --name ddpm-job "${log[@]}" "${words[@]}" &
trap 'event=taken; docker stop ddpm-job >/dev/null' TERM
wait $!
code=$?
if [[ -n ${event-} ]]; then
  # It was the signal that ended the first wait.
  wait $!
  code=$?
fi
end "$code" "ended with code $code"
