#!/usr/bin/env bash
# Set everything up and run a main job of this project, from data to pictures.
#
#     bash scripts/quickstart.sh [speaker|translation|diffusion|page] [OPTION...]
#
# speaker:     make recordings of synthetic voices, train a model that tells them apart, test it.
#              Options: bash scripts/quickstart.sh speaker --help
# translation: make English-Chinese sentence pairs, train a model that translates them, score it, train
#              a second one with back-translation, translate what you type.
#              Options: bash scripts/quickstart.sh translation --help
# diffusion:   train a model that draws digits, or images like yours, draw some, measure how good they are.
#              Options: bash scripts/quickstart.sh diffusion --help
# page:        train the three, or take what they trained, and open a page in the browser to use them.
#              Options: bash scripts/quickstart.sh page --help
#
# Safe to call again: it continues where it was stopped and skips what is done.
set -euo pipefail
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
root=$(dirname "$scripts")
jobs="speaker translation diffusion page"

case "${1:-}" in
-h | --help)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$scripts/quickstart.sh" | sed '$d'
    exit 0
    ;;
"" | -*) job=speaker ;;
*)
    job=$1
    shift
    ;;
esac
case " $jobs " in
*" $job "*) ;;
*)
    echo "error: there is no quickstart '$job': known are: $jobs" >&2
    exit 2
    ;;
esac

trap 'echo "stopped: the same command continues" >&2; exit 130' INT
extras=demo
if [ "$job" = page ]; then extras="demo page"; fi
# shellcheck disable=SC2086
bash "$scripts/setup.sh" $extras
exec "$root/.venv/bin/python" "$scripts/quickstart/$job.py" "$@"
