#!/usr/bin/env bash
# What launch/tpu_vm.py has each worker do, from the directory of the commit:
#   worker.sh setup                          makes .venv and installs the package with [tpu]
#   worker.sh doctor ARGUMENTS...            what launch/doctor.py finds on this worker
#   worker.sh start|again NAME TRY [VARIABLE...] -- ARGUMENTS...
#     has python ARGUMENTS run, and shows its log until it ends. What this TRY has started is not started twice;
#     what another try has left running is shown by start, if it is the same, and stopped by again.
#   worker.sh stop NAME                      has the run save and end, and not be started again by who watches it
# A run outlives the connection that started it. Its log, status and lock are in ~/reprise-runs/NAME.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
verb=$1 && shift

if [ "$verb" = setup ]; then
  [ -n "${REPRISE_PYTHON:-}" ] && exit 0 # an image that has everything
  [ -e .venv/installed ] && exit 0
  set -e
  for python in python3.12 python3.11; do
    "$python" -m venv .venv 2>/dev/null && break
  done
  if [ ! -x .venv/bin/pip ]; then # TPU VM images of Ubuntu 22.04 have Python 3.10
    python3 -m pip install -q --user uv
    python3 -m uv venv -q --clear --seed --python 3.12 .venv
  fi
  .venv/bin/pip install -q -e '.[tpu]'
  touch .venv/installed
  exit 0
fi

if [ "$verb" = doctor ]; then
  exec "${REPRISE_PYTHON:-.venv/bin/python}" -m launch.doctor --json "$@"
fi

name=$1 && shift
here=$HOME/reprise-runs/$name
mkdir -p "$here" && touch "$here/log"

finish() {
  echo "reprise: $(hostname) ended with $1"
  exit "$1"
}

# The lock is held by the run and all its children: unlike a pid it cannot be another's after a reboot.
# Looks share it, so that they are not taken for runs.
running() { ! flock -ns "$here/lock" true 2>/dev/null; }

stop() { # two minutes to save in; what hangs is killed
  for signal in TERM KILL; do
    kill -$signal "$(cat "$here/pid" 2>/dev/null)" 2>/dev/null
    for _ in $(seq 240); do
      running || return
      sleep 0.5
    done
  done
}

watch() { # from byte $1 of the log
  local pid status
  pid=$(cat "$here/pid")
  tail -c "+$1" -s 0.5 -F --pid="$pid" "$here/log" 2>/dev/null | sed -u "s/^/[$(hostname)] /"
  while running; do sleep 0.5; done
  [ -e "$here/stopped" ] && finish 130
  status=$(cat "$here/status" 2>/dev/null) && finish "$status"
  # no status: another try is about to take the place (it removes the pid first), or killed together with its shell
  [ "$(cat "$here/pid" 2>/dev/null)" = "$pid" ] || finish 75
  finish 137
}

if [ "$verb" = stop ]; then
  running && touch "$here/stopped" && stop
  echo "$(hostname): stopped"
  exit 0
fi

try=$1 && shift
while [ "$1" != -- ]; do
  if [ -z "${!1:-}" ]; then
    if ! value=$(gcloud secrets versions access latest --secret="$1" 2>/dev/null); then
      echo "error: env=$1: neither in the worker's environment nor in the secret manager: gcloud secrets create $1"
      finish 2
    fi
    export "$1=$value"
  fi
  shift
done
shift

from=$(($(wc -c <"$here/log") + 1))
if [ "$(cat "$here/try" 2>/dev/null)" != "$try" ]; then
  [ "$verb" = again ] && running && stop
  if running && [ "$(echo "$*")" != "$(cat "$here/command")" ]; then
    echo "error: name=$name: something else runs there: $(cat "$here/command"); stop it first, or wait for its end"
    finish 2
  fi
  if ! running; then
    rm -f "$here/pid" "$here/status" "$here/stopped"
    echo "$*" >"$here/command"
    # shellcheck disable=SC2016
    setsid bash -c '
      exec 9>"$0/lock" && flock 9
      "$@" >>"$0/log" 2>&1 &
      echo $! >"$0/pid.new" && mv "$0/pid.new" "$0/pid"
      wait $!
      echo $? >"$0/status"
    ' "$here" "${REPRISE_PYTHON:-.venv/bin/python}" "$@" </dev/null >/dev/null 2>&1 &
    while [ ! -e "$here/pid" ]; do sleep 0.1; done
  fi
  echo "$try" >"$here/try"
fi
watch "$from"
