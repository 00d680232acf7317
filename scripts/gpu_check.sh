#!/usr/bin/env bash
# Everything that needs a GPU, once: sets up, runs the tests marked gpu and the benchmark, writes one JSON.
#
#     bash scripts/gpu_check.sh [OUTPUT.json]
#
# OUTPUT is gpu_check.json unless given. It holds the card, the outcome of each test by name, and the figures of
# benchmarks/gpu.py. The exit code is 0 where all tests passed. Takes about 12 minutes on one GPU.
set -uo pipefail
output=${1:-gpu_check.json}
[ "${output:0:1}" = / ] || output=$PWD/$output
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
case "${1:-}" in
-h | --help)
    sed -n '2,/^set/s/^# \{0,1\}//p' scripts/gpu_check.sh
    exit 0
    ;;
esac
# NVIDIA, AMD, Windows: said before gigabytes are fetched
if ! compgen -G '/dev/nvidia[0-9]*' >/dev/null && [ ! -e /dev/kfd ] && [ ! -e /dev/dxg ]; then
    echo "error: this machine has no GPU: nothing is set up, nothing is checked" >&2
    exit 1
fi
folder=$(mktemp -d) || exit 1
trap 'rm -rf "$folder"' EXIT

bash scripts/setup.sh test || exit 1
python=.venv/bin/python
if ! $python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: torch sees no GPU here: nothing is checked (python -m ext_common.doctor says what there is)" >&2
    exit 1
fi
OMP_NUM_THREADS=1 $python -m pytest -q -n 0 -m gpu tests/gpu --junitxml "$folder/tests.xml"
tests=$?
$python -m benchmarks.gpu --tests "$folder/tests.xml" --output "$output" || exit 1
echo "wrote $output"
exit "$tests"
