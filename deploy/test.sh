#!/usr/bin/env bash
# Builds everything and runs every test; see --help. CI runs exactly this.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
Usage: deploy/test.sh [options] [-- ctest arguments]

Installs what is missing (deploy/install.sh), configures, builds everything, runs every test, and
sums up how many passed, failed and were skipped, and why. Fails when anything does.

  --preset=NAME   a preset of CMakePresets.json: dev, release, asan-ubsan, tsan,
                  clang-thread-safety or cuda (default: release, for the tests to run the
                  optimised kernels)
  --cuda          build and test the CUDA backend (default: only with --preset=cuda)
  --no-install    install nothing
  --jobs=N        parallel compilers and tests (default: the number of CPUs)
  --help          this text

Examples:
  deploy/test.sh                             everything
  deploy/test.sh --preset=asan-ubsan         everything, with sanitizers
  deploy/test.sh --no-install -- -R okenizer the tests whose name matches
TEXT
}

preset=release
cuda=OFF
install=1
jobs=$(nproc)
while [ $# -gt 0 ]; do
  case $1 in
    --preset=*) preset=${1#*=} ;;
    --cuda) cuda=ON ;;
    --no-install) install=0 ;;
    --jobs=*) jobs=${1#*=} ;;
    -h | --help)
      usage
      exit 0
      ;;
    --)
      shift
      break
      ;;
    *)
      echo "test.sh: unknown option \"$1\"" >&2
      usage >&2
      exit 2
      ;;
  esac
  shift
done
if [ "$preset" = cuda ]; then cuda=ON; fi

if [ "$install" -eq 1 ]; then
  groups=(build test)
  if [ "$preset" = clang-thread-safety ]; then groups+=(dev); fi
  ./deploy/install.sh "${groups[@]}"
fi
# For the build and the tests to find the tools.
if [ -d build/venv ]; then
  export VIRTUAL_ENV=$PWD/build/venv
  export PATH=$VIRTUAL_ENV/bin:$PATH
fi

# One compiler cache for all checkouts of the project, wherever they are.
export CCACHE_BASEDIR=${CCACHE_BASEDIR:-$PWD} CCACHE_NOHASHDIR=1

cmake --preset "$preset" -DMMFREE_TESTS=ON -DMMFREE_CUDA="$cuda"
cmake --build --preset "$preset" --parallel "$jobs"

report=$PWD/build/$preset/tests.xml
rm -f "$report"
status=0
ctest --test-dir "build/$preset" --output-on-failure --no-tests=error --parallel "$jobs" \
  --output-junit "$report" "$@" || status=$?
if [ -f "$report" ]; then python3 deploy/summarize_tests.py "$report" || status=$?; fi
exit "$status"
