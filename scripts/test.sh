#!/usr/bin/env bash
# Lint, types and tests; sets up what is missing first.
#
#     bash scripts/test.sh [fast] [PYTEST ARGUMENT...]
#
# Runs ruff, mypy and the tests; with `fast` as first word without those marked slow. Further arguments
# go to pytest: bash scripts/test.sh fast tests/speaker -k pooling
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
case "${1:-}" in
-h | --help)
    sed -n '2,/^set/s/^# \{0,1\}//p' scripts/test.sh
    exit 0
    ;;
esac
which="slow or not slow"
if [ "${1:-}" = fast ]; then
    which="not slow"
    shift
fi

bash scripts/setup.sh test || exit 1
# Hundreds of processes would each compile the packages and the tests anew.
unset PYTHONDONTWRITEBYTECODE
python=.venv/bin/python
failed=()

$python -m ruff check . || failed+=("ruff check")
$python -m ruff format --check . || failed+=("ruff format (mend with: $python -m ruff format .)")
types=$(mktemp)
$python -m mypy >"$types" 2>&1 &
trap 'rm -f "$types"; kill $! 2>/dev/null' EXIT
# A process more than cores, as a sixth of the time is waited, and a thread for each; who has nothing left
# takes half of another's.
processes=$(($(nproc) + 1))
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} \
    $python -m pytest -q --durations=5 -n $((processes < 8 ? processes : 8)) --dist worksteal \
    -m "$which" "$@"
code=$?
case $code in
0) ;;
2 | 130) exit "$code" ;;
5) failed+=("no test selected") ;;
*) failed+=("tests") ;;
esac
wait $! || failed+=("mypy")
cat "$types"

if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[@]}" >&2
    exit 1
fi
echo "all passed"
