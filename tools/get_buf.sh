#!/usr/bin/env bash
# Puts buf into node_modules/ (package.json names the version). Where npm is missing, root gets it installed
# and others are told.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v npm >/dev/null; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends nodejs npm
  else
    echo "error: npm is needed for buf; on Debian and Ubuntu: apt-get install nodejs npm" >&2
    exit 1
  fi
fi
npm install --no-package-lock --no-audit --no-fund
