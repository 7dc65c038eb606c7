#!/usr/bin/env bash
# Sees to it that the page's tests have their browser. Where it is missing, root gets it installed and others
# are told.
set -euo pipefail
if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then
  exit 0
fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver
else
  echo "error: chromium and chromedriver are needed to test the page at /ui; on Debian:" \
    "apt-get install chromium chromium-driver" >&2
  exit 1
fi
