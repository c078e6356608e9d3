# Sourced by the other scripts: makes .venv once and sets PYTHON. ENVIRONMENT_EXTRAS names extras ("dev").
# To use an environment of your own, set FINEBRIDGE_PYTHON to its python; nothing is installed then.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="${FINEBRIDGE_PYTHON:-$root/.venv/bin/python}"

find_python() {
  for name in python3 python3.14 python3.13 python3.12 python3.11; do
    if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      echo "$name"
      return
    fi
  done
  echo "error: Python 3.11 or newer is needed and was not found" >&2
  exit 2
}

install_torch() {
  if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    "$PYTHON" -m pip install -qq "torch>=2.11"
  elif ! "$PYTHON" -m pip install -qq "torch==2.13.0+cpu" 2>/dev/null; then
    echo "set-up: your package index has no CPU build of torch; installing the default build (several GB)." \
      "PIP_EXTRA_INDEX_URL can name PyTorch's CPU index instead" >&2
    "$PYTHON" -m pip install -qq "torch==2.13.0"
  fi
}

set_up() {
  local extras="${ENVIRONMENT_EXTRAS:-}" python stamp
  stamp="$root/.venv/.finebridge-$(cat "$root/pyproject.toml" "$root/setup.py" | cksum | cut -d' ' -f1)-${extras:-core}"
  [ -e "$stamp" ] && return
  python="$(find_python)"
  mkdir -p "$root/.venv"
  exec 9>"$root/.venv/.lock"
  flock 9
  if [ ! -e "$stamp" ]; then
    echo "set-up: making $root/.venv (once, some minutes)"
    if ! "$python" -m venv "$root/.venv"; then
      echo "error: $python cannot make an environment; on Debian and Ubuntu it needs: apt-get install python3-venv" >&2
      exit 2
    fi
    "$PYTHON" -m pip install -qq "setuptools>=77" wheel ninja
    echo "set-up: 1 of 2, torch"
    install_torch
    echo "set-up: 2 of 2, finebridge and what it needs"
    DS_BUILD_OPS=0 "$PYTHON" -m pip install -qq --no-build-isolation -e "$root${extras:+[$extras]}"
    touch "$stamp"
  fi
  flock -u 9
}

[ -n "${FINEBRIDGE_PYTHON:-}" ] || set_up
export PATH="$(dirname "$PYTHON"):$PATH"
