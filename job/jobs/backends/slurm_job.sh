# Runs a job's program on all its nodes, notes in Slurm how it ended, and has Slurm start it again if that may help.
#
# A constant: `slurm.py` puts options for sbatch before it, and these variables:
#   words    the command that starts the program once on each node
#   job      its number, and its slice's: the number alone, which the last slice has, means all slices
#   bucket   of the job
#   retries  how many failures may be tried again
#   never, uncounted    the exit codes, by the table, after which nothing is tried again, and that are no failures
# shellcheck shell=bash disable=SC2154
set -u

say() { printf 'ddpm-slurm: %s\n' "$1"; }

# Slurm keeps this comment through all attempts, and shows it for some minutes after the job's end.
remember() {
  scontrol update JobId="$job" Comment="ddpm began=$began failures=$failures code=$1 bucket=$bucket"
}

# While Slurm restarts it answers nothing, and a job that ends meanwhile would never be requeued.
ask_slurm() {
  for _ in {1..60}; do
    squeue --noheader --states=all --jobs="$job" --format="$1" && return
    sleep 5
  done
}

if [[ $(ask_slurm %k) =~ ^ddpm\ began=([0-9]+)\ failures=([0-9]+) ]]; then
  began=${BASH_REMATCH[1]} failures=${BASH_REMATCH[2]}
else
  began=$(date +%s) failures=0
fi
remember ''
say "job $SLURM_JOB_ID begins on $SLURM_JOB_NODELIST at $(date --utc +%FT%TZ)"

# Slurm tells the program when its time is nearly up; when the job is preempted or cancelled, it tells this script, too,
# which waits for the program, and then ignores a late signal: that would end a command that notes the code.
trap : TERM
"${words[@]}"
code=$?
trap '' TERM

why="ended with code $code"
# Slurm itself ends a job that was cancelled, and requeues one that was preempted, whatever its code. It would do so
# once more after the end of a job that was requeued here.
if [[ $(ask_slurm %T) != RUNNING || $(scontrol --oneliner show job "$job") =~ \ PreemptTime=[0-9] ]]; then
  remember "$code"
  say "$why"
  exit "$code"
fi
again=yes
if ((code == 0)); then
  again=
elif [[ " $never " == *" $code "* ]]; then
  again='' why+=', which would come again'
elif [[ " $uncounted " != *" $code "* ]]; then
  ((++failures <= retries)) || again=
  why+=" (failure $failures; $retries are tried again)"
fi
say "$why"
# Without its count a failure would come again for ever.
remember "$code" || [[ " $uncounted " == *" $code "* ]] || again=
if [[ $again ]]; then
  if scontrol requeue "$job"; then
    say "waiting in the queue for the next attempt"
  else
    say "this cluster requeues no jobs: the same command, or --watch, goes on"
  fi
fi
exit "$code"
