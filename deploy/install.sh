#!/usr/bin/env bash
# Installs what is missing of the given groups of deploy/packages.txt; see --help.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
Usage: deploy/install.sh GROUP...

Installs the packages of these groups of deploy/packages.txt (build, test, dev) that are
missing, with apt-get, as root or through sudo. With "test" it also puts the Python tools of
deploy/requirements.txt into build/venv, and promtool, for which no service is installed or started.
Nothing is downloaded when nothing is missing.
TEXT
}

as_root() {
  if [ "$(id -u)" -eq 0 ]; then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo "$@"
  else
    echo "install.sh: neither root nor sudo; run this first: $*" >&2
    return 1
  fi
}

is_installed() {
  [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

install_packages() {
  local group package wanted missing=()
  while read -r group package _; do
    for wanted in "$@"; do
      if [ "$group" = "$wanted" ] && ! is_installed "$package"; then missing+=("$package"); fi
    done
  done <deploy/packages.txt
  if [ ${#missing[@]} -eq 0 ]; then return; fi
  echo "Installing ${missing[*]}"
  as_root apt-get update -q
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends \
    "${missing[@]}"
}

install_python_tools() {
  local venv=build/venv
  if [ -f "$venv/requirements.txt" ] && cmp -s deploy/requirements.txt "$venv/requirements.txt"; then
    return
  fi
  echo "Installing deploy/requirements.txt into $venv"
  if python3 -m venv "$venv" &&
    "$venv/bin/pip" install -q --disable-pip-version-check -r deploy/requirements.txt; then
    cp deploy/requirements.txt "$venv/"
  else
    echo "install.sh: no Python tools; the tests that need them will be skipped" >&2
  fi
}

# promtool comes in the package of the Prometheus server, whose installation starts a service; the
# program alone is taken out of it. Without it the tests that need it are skipped and say so.
install_promtool() {
  local bin=$PWD/build/venv/bin scratch status=0
  mkdir -p "$bin"
  if command -v promtool >/dev/null || [ -x "$bin/promtool" ]; then return; fi
  echo "Fetching promtool"
  scratch=$(mktemp -d)
  # apt downloads as its own user, who must be able to write here.
  chmod 755 "$scratch"
  if [ "$(id -u)" -eq 0 ]; then chown _apt "$scratch" || true; fi
  (cd "$scratch" && apt-get download -q prometheus && dpkg-deb -x ./*.deb . &&
    install -m 755 usr/bin/promtool "$bin/promtool") || status=$?
  rm -rf "$scratch"
  if [ "$status" -ne 0 ]; then echo "install.sh: no promtool; its tests will be skipped" >&2; fi
}

if [ $# -eq 0 ]; then
  usage >&2
  exit 2
fi
for group in "$@"; do
  case $group in
    build | test | dev) ;;
    -h | --help)
      usage
      exit 0
      ;;
    *)
      echo "install.sh: no group \"$group\"" >&2
      usage >&2
      exit 2
      ;;
  esac
done

if ! command -v apt-get >/dev/null; then
  echo "install.sh: no apt-get here; install the packages of deploy/packages.txt yourself" >&2
  exit 1
fi
install_packages "$@"
for group in "$@"; do
  if [ "$group" = test ]; then
    install_python_tools
    install_promtool
  fi
done
