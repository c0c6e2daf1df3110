#!/usr/bin/env bash
# Prints the packages whose shared libraries the given programs load: what a machine that only runs
# them needs. Usage: deploy/runtime_packages.sh PROGRAM...
set -euo pipefail
if [ $# -eq 0 ] || [ "$1" = --help ]; then
  sed -n '2,3s/^# //p' "$0"
  exit 0
fi
ldd "$@" | awk '$2 == "=>" && $3 ~ /^\// {print $3}' | sort -u | while read -r library; do
  # Libraries lie in /usr/lib and /lib is a link to it, but some packages still say /lib.
  real=$(realpath "$library")
  dpkg-query -S "$real" 2>/dev/null || dpkg-query -S "${real#/usr}"
done | cut -d: -f1 | sort -u
