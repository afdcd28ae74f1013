#!/bin/bash
# One machine's part of a job: train/launch/node.sh ARGUMENTS does what `accelerate launch ARGUMENTS` does, and hands
# SIGTERM and SIGUSR1 to the training processes as SIGUSR1, so that they save and stop. For SLURM, and as a container's
# command.
#
# Without it a stop signal ends badly: processes of torch's launcher have sessions of their own, which a signal to the
# group of a SLURM task or of `tini -g` does not reach; the launcher itself dies of SIGUSR1, and passes SIGTERM on but
# kills, 30 seconds later, what still saves.
set -uo pipefail

setsid accelerate launch "$@" & # a session of its own: a signal to our group is ours alone to pass on
launcher=$!
stop() {
    local training
    training=$(<"/proc/$launcher/task/$launcher/children")
    # shellcheck disable=SC2086  # one word for each process
    if [ -n "$training" ]; then kill -USR1 $training; else kill -TERM "$launcher"; fi
}
trap stop TERM USR1

while kill -0 "$launcher" 2>/dev/null; do
    wait "$launcher" # which a signal interrupts
done
wait "$launcher" # for its exit code, which bash keeps
