#!/usr/bin/env bash
# Make .venv and install this project with the named extras where that is not done yet.
#
#     bash scripts/setup.sh [EXTRA...]        e.g. bash scripts/setup.sh test demo
#
# Takes PYTHON where set, else the first Python 3.11 or 3.12 that runs, else one that uv fetches. Safe to
# call every time: does nothing until setup.cfg changes or a new extra is asked for.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Run, not looked up: a pyenv shim exists for versions that are not active, and then fails.
suits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' >/dev/null 2>&1; }
has_venv() { "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }

# Where uv keeps the Pythons that it fetched.
fetched=${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-$HOME/.local/share}/uv/python}

find_python() {
    local candidate found=
    if [ -n "${PYTHON:-}" ]; then
        suits "$PYTHON" || fail "PYTHON=$PYTHON is not a working Python 3.11 or 3.12"
        has_venv "$PYTHON" || fail "PYTHON=$PYTHON cannot make environments: install its venv package"
        echo "$PYTHON"
        return
    fi
    for candidate in python3.11 python3.12 python3 python /usr/bin/python3.1[12] \
        /usr/local/bin/python3.1[12] "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[12].*/bin/python \
        "$fetched"/cpython-3.1[12].*/bin/python3; do
        suits "$candidate" || continue
        found=$candidate
        has_venv "$candidate" || continue
        echo "$candidate"
        return
    done
    [ -z "$found" ] || fail "$found cannot make environments: install its venv package" \
        "(Debian, Ubuntu: apt install python3-venv), or set PYTHON to another Python 3.11 or 3.12"
    fetch_python
}

# Debian 13, Ubuntu 26.04 and Fedora bring later versions only, for which there is no wheel of fairseq.
fetch_python() {
    local uv=uv other tools said
    echo "setup: there is no Python 3.11 or 3.12 here, fetching 3.12 with uv" >&2
    if ! uv --version >/dev/null 2>&1; then
        for other in python3 python /usr/bin/python3; do
            "$other" -c 'import sys; sys.exit(sys.version_info < (3, 8))' >/dev/null 2>&1 &&
                has_venv "$other" && break
            other=
        done
        [ -n "$other" ] || give_up "uv is not installed, and no python3 that could make an environment for it"
        tools=$(mktemp -d)
        # when the subshell of $(find_python) ends; by then the variable is gone
        trap "rm -rf '$tools'" EXIT
        said=$("$other" -m venv "$tools" 2>&1 && "$tools/bin/python" -m pip install -q uv 2>&1) ||
            give_up "uv could not be fetched: $(last_line "$said")"
        uv=$tools/bin/uv
    fi
    said=$(UV_PYTHON_INSTALL_DIR=$fetched "$uv" python install 3.12 2>&1) ||
        give_up "uv could not fetch it: $(last_line "$said")"
    for other in "$fetched"/cpython-3.12.*/bin/python3; do
        suits "$other" && echo "$other" && return
    done
    give_up "uv put no Python 3.12 that runs into $fetched"
}

give_up() {
    fail "no working Python 3.11 or 3.12 found, and fetching one needs the network ($1): install one" \
        "(pyenv install 3.11, or your system's package) or set PYTHON to its path"
}

last_line() { sed -n '$s/^ *//p' <<<"$1"; }

# Two of these at once (quickstart beside test) would install into one folder: the second waits.
exec 9<.
if command -v flock >/dev/null; then flock 9; fi

if [ ! -x .venv/bin/python ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    echo "setup: making .venv with $("$python" --version)"
    "$python" -m venv .venv || fail ".venv could not be made with $python"
fi
suits .venv/bin/python ||
    fail ".venv holds $(.venv/bin/python --version 2>&1), not Python 3.11 or 3.12: remove .venv and run again"

# One stamp an extra; "base" is the project itself. The path counts too: an editable install of a
# folder that was moved points nowhere.
wanted=$(cat setup.cfg pyproject.toml <(pwd -P) | .venv/bin/python -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
missing=
for extra in base "$@"; do
    [ "$(cat ".venv/.installed-$extra" 2>/dev/null)" = "$wanted" ] || missing=yes
done
[ -n "$missing" ] || exit 0

extras=$(
    IFS=,
    echo "$*"
)
echo "setup: installing this project${extras:+ with $extras} (the first time takes a few minutes)"
quiet=--quiet
if [ -t 1 ]; then quiet=; fi
.venv/bin/python -m pip install --disable-pip-version-check $quiet --no-compile -e ".${extras:+[$extras]}" ||
    fail "installation failed: see pip's message above; it needs the network or a pip mirror"
# By all processors; pip uses one, for as long as all else. Some packages hold files of other Pythons.
.venv/bin/python -m compileall -q -j 0 .venv/lib >/dev/null 2>&1 || true
.venv/bin/python -m ext_common.doctor --quiet
for extra in base "$@"; do
    echo "$wanted" >".venv/.installed-$extra"
done
