#!/bin/sh
# Makes .venv with the pinned dependencies (`install`), sees to it that a frame can be rendered (`rendering`), or gets
# the browser that tests open a page in (`browser`), without which they are skipped. Started by the Makefile and by
# .ci/run, in the repository's root. PYTHON=/path/to/python3.12 says which Python to take.
set -eu

opengl="libegl1 libgles2 libosmesa6"

say() { echo "ledream: $*"; }
fail() { say "$*" >&2; exit 1; }

version_fits() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

find_python() {
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        if version_fits "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    if [ -n "${PYTHON:-}" ]; then
        fail "PYTHON=$PYTHON is not a Python 3.11, 3.12 or 3.13"
    fi
    fail "found no Python 3.11, 3.12 or 3.13. Install one, or name it: make PYTHON=/path/to/python3.12"
}

venv_works() { version_fits .venv/bin/python && .venv/bin/python -m pip --version >/dev/null 2>&1; }

make_venv() {
    python=$(find_python)
    say "making .venv with $("$python" --version) ($python)"
    if "$python" -m venv --clear .venv 2>/dev/null && venv_works; then
        return
    fi
    # Debian and Ubuntu keep venv's copy of pip in a package of its own; the pip that is there can stand in for it.
    if "$python" -m venv --clear --without-pip .venv && "$python" -m pip --python .venv/bin/python install pip; then
        venv_works && return
    fi
    fail "$python cannot make a virtual environment. On Debian or Ubuntu, run: $(as_root)apt-get install -y python3-venv"
}

as_root() { [ "$(id -u)" -eq 0 ] || echo "sudo "; }

apt() {
    if [ "$(id -u)" -eq 0 ]; then
        env DEBIAN_FRONTEND=noninteractive apt-get "$@" </dev/null
    else
        sudo -n env DEBIAN_FRONTEND=noninteractive apt-get "$@" </dev/null
    fi
}

may_use_apt() {
    command -v apt-get >/dev/null && { [ "$(id -u)" -eq 0 ] || sudo -n true 2>/dev/null; }
}

install() {
    venv_works || make_venv
    say "installing the pinned dependencies into .venv"
    .venv/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
}

rendering() {
    if .venv/bin/python -m envs.rendering; then
        return
    fi
    if may_use_apt; then
        say "installing OpenGL: $opengl"
        apt update || say "apt-get update failed; going on with the package lists that are here" >&2
        # Newer releases have no OSMesa any more, and Mesa's EGL draws without it.
        apt install -y --no-install-recommends $opengl || apt install -y --no-install-recommends libegl1 libgles2 || true
        if .venv/bin/python -m envs.rendering; then
            return
        fi
    fi
    fail "no frame can be rendered here. Install OpenGL, then run make again: $(as_root)apt-get install -y $opengl"
}

browser() {
    command -v chromium >/dev/null && return
    if may_use_apt; then
        say "installing chromium"
        apt update || say "apt-get update failed; going on with the package lists that are here" >&2
        apt install -y --no-install-recommends chromium || true
    fi
    command -v chromium >/dev/null || say "no chromium here; the tests that open a page in it are skipped" >&2
}

case "${1:-}" in
    install | rendering | browser) "$1" ;;
    *) fail "usage: sh runners/bootstrap.sh install|rendering|browser" ;;
esac
