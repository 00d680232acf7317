#!/usr/bin/env bash
# Monolingual text to a better model: set everything up, then reverse model, back-translation, forward model.
#
#     bash scripts/backtranslate.sh DATA MONO OUT --source-lang en --target-lang zh [OPTION...]
#
# Options: bash scripts/backtranslate.sh --help
# Safe to call again: it continues where it was stopped and skips what is done.
set -euo pipefail
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
root=$(dirname "$scripts")

trap 'echo "stopped: the same command continues" >&2; exit 130' INT
bash "$scripts/setup.sh"
exec "$root/.venv/bin/python" "$scripts/backtranslate.py" "$@"
