#!/usr/bin/env bash
# Compiles every header under include/ alone, with all warnings as errors, with MICROREG_COMPILED, and the public ones
# header-only too: a user may include them in any order.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../cmake/bootstrap.sh"

microreg_bootstrap
microreg_build microreg_check_headers microreg_check_headers_only
echo "$(find "$microreg_root/include" -name '*.hpp' | wc -l) headers are self-contained"
