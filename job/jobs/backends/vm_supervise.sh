#!/bin/bash
# Runs a job's container on a VM of its own until the job is over, and then deletes the VM.
#
# A constant: all that differs between jobs comes from files, a word a line, and from the unit's environment:
#   words        of `docker run`, after the options for the log
#   image        to pull
#   DDPM_JOB, DDPM_SLICE, DDPM_SLICES    for the log
#   DDPM_GPUS                how many GPUs the driver is for; 0 needs none
#   DDPM_REGISTRY            host that wants this machine's credentials; may be empty
#   DDPM_NEVER, DDPM_ALWAYS  exit codes that end the job, and that are retried uncounted: "2 64 65"
#   DDPM_FAILURES            so many others end it
#   DDPM_GRACE_SECONDS       from SIGTERM to SIGKILL
#   DDPM_PAUSE_SECONDS, DDPM_TICK_SECONDS    before the first retry, and between two looks
# Far and wide there are only bash, coreutils, sed, curl and docker: this is Container-Optimized OS.
set -u

readonly files=${DDPM_FILES:-/etc/ddpm}
readonly scratch=${DDPM_SCRATCH:-/var/lib/ddpm/scratch}
readonly compute=${DDPM_COMPUTE:-https://compute.googleapis.com}
readonly logging=${DDPM_LOGGING:-https://logging.googleapis.com}
readonly metadata="http://${GCE_METADATA_HOST:-metadata.google.internal}/computeMetadata/v1"
readonly container=ddpm-job pull_tries=5 driver_tries=3 missing_input=66 away=69
readonly tick=${DDPM_TICK_SECONDS:-1} pause=${DDPM_PAUSE_SECONDS:-10}
readonly longest_pause=$((pause * 30)) short_attempt=$((pause * 6))
stopping=0
child=
said=

trap 'stopping=1' TERM INT

say() { printf 'ddpm-vm: %s\n' "$*"; }

known() { curl --silent --fail --max-time 5 --header 'Metadata-Flavor: Google' "$metadata/$1"; }

# Says VALUE under KEY where `ddpm jobs status` looks while the machine is there.
tell() {
  curl --silent --fail --max-time 5 --request PUT --header 'Metadata-Flavor: Google' --data "$2" \
    "$metadata/instance/guest-attributes/ddpm/$1" >/dev/null || say "could not tell $1=$2"
}

# Sends a request with this machine's token, which curl reads from its input: arguments can be seen by others.
authorized() {
  local token
  token=$(known instance/service-accounts/default/token | sed -n 's/.*"access_token" *: *"\([^"]*\)".*/\1/p')
  printf 'header = "Authorization: Bearer %s"\n' "$token" |
    curl --config - --silent --show-error --fail --max-time 10 --output /dev/null "$@"
}

# Leaves EVENT, CODE and a MESSAGE of harmless characters in Cloud Logging, where they outlive the machine.
record() {
  local body message
  message=$(printf '%s' "$3" | tr -c '[:alnum:] .,:;/_()@=-' ' ' | cut -c 1-400)
  printf -v body '{"logName": "projects/%s/logs/ddpm-jobs", "resource": {"type": "global"}, "entries": [{%s, %s}]}' "$project" \
    "\"labels\": {\"ddpm-job\": \"$DDPM_JOB\", \"ddpm-slice\": \"$DDPM_SLICE\", \"ddpm-slices\": \"$DDPM_SLICES\"}" \
    "\"jsonPayload\": {\"event\": \"$1\", \"code\": $2, \"attempts\": $attempts, \"message\": \"$message\"}"
  authorized --header 'Content-Type: application/json' --data "$body" "$logging/v2/entries:write"
}

# Sleeps for a moment, or until a signal comes. Short, for one that comes just before it is noticed by nobody.
moment() {
  sleep "$1" >/dev/null 2>&1 &
  wait $!
}

# Runs a command until it ends, and sets `code`; a signal meanwhile stops the container, which may take its time.
run() {
  "$@" &
  child=$!
  while kill -0 "$child" 2>/dev/null; do
    if ((stopping)); then
      # Again and again: the container may only just be coming up.
      docker stop -t "$DDPM_GRACE_SECONDS" "$container" >/dev/null 2>&1 || kill -TERM "$child" 2>/dev/null
    fi
    moment "$tick"
  done
  wait "$child"
  code=$?
}

# Waits, unless a signal comes.
rest() {
  local until=$((SECONDS + $1))
  while ((SECONDS < until && !stopping)); do moment "$tick"; done
}

leave_if_stopping() {
  ((stopping)) || return 0
  say "the machine is being taken away: stopped with code ${code:-75}"
  record stopped "${code:-75}" "the machine was taken away or its time was up"
  exit 0
}

# Says how the job ended, and removes the machine, or switches it off where it may not remove itself.
finish() {
  local final=$1 message=$2
  say "$message"
  tell exit-code "$final"
  tell phase over
  record over "$final" "$message" || say "could not write to Cloud Logging"
  local tries
  for tries in 1 2 3; do
    authorized --request DELETE "$compute/compute/v1/projects/$project/zones/$zone/instances/$machine" && exit 0
    ((stopping)) && exit 0
    ((tries < 3)) && rest "$pause"
  done
  say "this machine may not delete itself (compute.instances.delete): switching it off; delete it, its disk costs money"
  systemctl poweroff
  exit 0
}

in_list() { [[ " $2 " == *" $1 "* ]]; }

install_driver() {
  local tries
  tell phase driver
  for ((tries = 1; tries <= driver_tries; tries++)); do
    run cos-extensions install gpu -- -version=latest
    leave_if_stopping
    if ((code == 0)); then
      # /var lets nothing be executed.
      mount --bind /var/lib/nvidia /var/lib/nvidia && mount -o remount,exec /var/lib/nvidia && return 0
    fi
    rest "$pause"
  done
  finish "$away" "the GPU driver could not be installed; the serial console says why"
}

pull() {
  local image tries
  tell phase image
  image=$(<"$files/image")
  if [[ -n $DDPM_REGISTRY ]]; then
    run docker-credential-gcr configure-docker --registries="$DDPM_REGISTRY"
  fi
  for ((tries = 1; tries <= pull_tries; tries++)); do
    run docker pull --quiet "$image"
    leave_if_stopping
    ((code == 0)) && return 0
    rest "$((pause * tries))"
    leave_if_stopping
  done
  finish "$missing_input" "the image $image could not be pulled: check its name, and that this machine's account has \
roles/artifactregistry.reader"
}

# Starts the container again and again, until its exit code says that there is no use.
keep_running() {
  local -a words log
  local failures=0 began wait_seconds=$pause
  mapfile -t words <"$files/words"
  log=(--log-driver=gcplogs '--log-opt=labels=ddpm-job,ddpm-slice')
  [[ -n $said ]] || log=(--log-driver=local)
  tell phase running
  while :; do
    attempts=$((attempts + 1))
    tell attempts "$attempts"
    docker rm --force "$container" >/dev/null 2>&1
    began=$SECONDS
    run docker run --name "$container" --rm "${log[@]}" "${words[@]}"
    if ((code == 0)); then
      finish 0 "finished"
    elif in_list "$code" "$DDPM_NEVER"; then
      finish "$code" "ended with code $code, which is not retried"
    fi
    leave_if_stopping
    if ! in_list "$code" "$DDPM_ALWAYS"; then
      failures=$((failures + 1))
      ((failures < DDPM_FAILURES)) || finish "$code" "ended with code $code, for the ${failures}th time with such a code"
    fi
    if [[ $(known instance/preempted) == TRUE ]]; then
      say "this machine is about to be taken away"
      rest 120
      leave_if_stopping
    fi
    # Who worked for long is tried again soon.
    ((SECONDS - began >= short_attempt)) && wait_seconds=$pause
    say "ended with code $code: again in $wait_seconds s"
    record again "$code" "attempt $attempts ended"
    rest "$wait_seconds"
    leave_if_stopping
    wait_seconds=$((wait_seconds * 2 < longest_pause ? wait_seconds * 2 : longest_pause))
  done
}

attempts=0
code=
until project=$(known project/project-id) && zone=$(known instance/zone) && machine=$(known instance/name); do
  say "waiting for the metadata server"
  rest 2
  ((stopping)) && exit 0
done
zone=${zone##*/}
readonly project zone machine
if record started 0 "started"; then
  said=yes
else
  say "this machine's account lacks roles/logging.logWriter: what the job prints stays on this machine"
fi
mkdir -p "$scratch" && chown 10001:10001 "$scratch"
((DDPM_GPUS == 0)) || install_driver
pull
keep_running
