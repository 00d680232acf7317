#!/usr/bin/env bash
# Lint, types and tests; sets up what is missing first.
#
#     bash scripts/test.sh [fast] [PYTEST ARGUMENT...]
#
# Runs ruff, mypy, the fast tests and then those marked slow; with `fast` as first word without the slow
# ones. Further arguments go to pytest: bash scripts/test.sh fast tests/speaker -k pooling
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
case "${1:-}" in
-h | --help)
    sed -n '2,/^set/s/^# \{0,1\}//p' scripts/test.sh
    exit 0
    ;;
esac
suites=("not slow" "slow")
if [ "${1:-}" = fast ]; then
    suites=("not slow")
    shift
fi

bash scripts/setup.sh test || exit 1
python=.venv/bin/python
failed=()
ran=

$python -m ruff check . || failed+=("ruff check")
$python -m ruff format --check . || failed+=("ruff format (mend with: $python -m ruff format .)")
$python -m mypy || failed+=("mypy")
# A process for each core, and a thread for each of these; a file stays in one process, as what its tests share
# is made once a process.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
for suite in "${suites[@]}"; do
    $python -m pytest -q --durations=5 -n auto --maxprocesses 8 --dist loadfile -m "$suite" "$@"
    code=$?
    # 5: nothing selected. Right for one of the suites when arguments select from the other only.
    case $code in
    0) ran=yes ;;
    5) ;;
    130 | 2) exit "$code" ;;
    *) failed+=("tests ($suite)") ;;
    esac
done
[ -n "$ran" ] || [ ${#failed[@]} -gt 0 ] || failed+=("no test selected")

if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[@]}" >&2
    exit 1
fi
echo "all passed"
