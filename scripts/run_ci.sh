#!/usr/bin/env bash
# Full validation: every check of scripts/test, with the tests that train for minutes.
#   scripts/run_ci.sh [arguments of pytest]
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/test" --slow "$@"
