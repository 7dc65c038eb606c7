#!/usr/bin/env bash
# Makes a virtual environment with pip in it: tools/make_venv.sh FOLDER. PYTHON names the interpreter.
# Debian's python3 cannot do that before python3-venv is there, so root gets it installed and others are told.
set -euo pipefail
folder=$1
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: $("$python" --version) is too old: Python 3.11 or newer is needed (choose one with PYTHON=...)" >&2
  exit 1
}
if ! "$python" -c 'import ensurepip' 2>/dev/null; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends python3-venv
  else
    echo "error: $python has no ensurepip; on Debian and Ubuntu: apt-get install python3-venv" >&2
    exit 1
  fi
fi
[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
