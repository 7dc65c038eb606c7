#!/usr/bin/env bash
# Puts Debian's prometheus and promtool into .prometheus/usr/bin. Where they are installed, these are linked.
# Elsewhere Debian's packages are unpacked there, which needs no root and starts no service; installing the
# package would start one on port 9090.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=.prometheus
rm -rf "$folder"
mkdir -p "$folder/usr/bin"
if command -v prometheus >/dev/null && command -v promtool >/dev/null; then
  ln -s "$(command -v prometheus)" "$(command -v promtool)" "$folder/usr/bin/"
elif command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null; then
  if [ "$(id -u)" = 0 ]; then
    apt-get update -qq
  elif [ -z "$(apt-cache show prometheus 2>/dev/null)" ]; then
    echo "error: apt knows no package prometheus; run 'apt-get update' as root first" >&2
    exit 1
  fi
  # The scripts and fonts of its web pages are packages of their own, reached by relative links.
  mapfile -t packages < <(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts \
    --no-breaks --no-replaces --no-enhances prometheus | grep -E '^(prometheus|libjs-.*|fonts-.*)$' | sort -u)
  downloads=$(mktemp -d)
  trap 'rm -rf "$downloads"' EXIT
  chmod 755 "$downloads"
  (cd "$downloads" && apt-get download -qq -o APT::Sandbox::User=root "${packages[@]}")
  for package in "$downloads"/*.deb; do
    dpkg-deb -x "$package" "$folder"
  done
else
  echo "error: prometheus and promtool are not installed, and this is not Debian or Ubuntu, whose package" \
    "could be unpacked; install them from prometheus.io" >&2
  exit 1
fi
"$folder/usr/bin/prometheus" --version | head -1
