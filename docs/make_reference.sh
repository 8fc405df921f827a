#!/usr/bin/env bash
# Makes the API reference by Doxygen (Debian: doxygen), from the public headers and the pages of docs/:
#
#     docs/make_reference.sh [FOLDER]     FOLDER/html/index.html; by default build/reference
#
# A warning is an error: a comment that Doxygen cannot read or that names what is not there, a page with a dead link, a
# public member without a comment. Parameters are described in its prose.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
output="$(realpath -m "${1:-build/reference}")"
if ! command -v doxygen >/dev/null || ! command -v python3 >/dev/null; then
  echo "error: doxygen or python3 is missing; on Debian: apt-get install doxygen python3" >&2
  exit 77
fi
version="$(sed -n 's/.*version = "\([0-9.]*\)".*/\1/p' include/microreg/version.hpp)"

# Public are the headers that users include, and of these folders the scopes.
mapfile -t internal < <(find include/microreg/{detail,definitions,step,fused,gates} -name '*.hpp' \
  ! -path '*/fused/scope.hpp' ! -path '*/gates/scope.hpp' ! -path '*/gates/tape.hpp')

# What Doxygen reads: the pages with what its Markdown does not know put into words that it does.
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 docs/reference_pages.py "$work"

mkdir -p "$output"
doxygen - <<DOXYFILE
PROJECT_NAME           = microreg
PROJECT_NUMBER         = $version
PROJECT_BRIEF          = "Explicit regularizers by exact double backward for any LibTorch training loop"
OUTPUT_DIRECTORY       = "$output"
INPUT                  = "$work" include
FILE_PATTERNS          = *.hpp *.md
RECURSIVE              = YES
EXCLUDE                = $(printf '%s ' "${internal[@]}")
EXCLUDE_SYMBOLS        = *::detail *::detail::* MICROREG_ABI*
INPUT_FILTER           = "sed s/::inline.MICROREG_ABI//"
STRIP_FROM_PATH        = "$work" include
STRIP_FROM_INC_PATH    = include
IMAGE_PATH             = docs docs/images docs/reproduction
USE_MDFILE_AS_MAINPAGE = "$work/README.md"
MARKDOWN_SUPPORT       = YES
TOC_INCLUDE_HEADINGS   = 2
AUTOLINK_SUPPORT       = YES
EXTRACT_ALL            = NO
EXTRACT_STATIC         = NO
HIDE_UNDOC_MEMBERS     = NO
HIDE_FRIEND_COMPOUNDS  = YES
HIDE_SCOPE_NAMES       = YES
JAVADOC_AUTOBRIEF      = YES
INLINE_SIMPLE_STRUCTS  = NO
BUILTIN_STL_SUPPORT    = YES
ENABLE_PREPROCESSING   = YES
MACRO_EXPANSION        = YES
EXPAND_ONLY_PREDEF     = YES
PREDEFINED             = MICROREG_COMPILED MICROREG_INLINE= __cplusplus=202002L
QUIET                  = YES
WARNINGS               = YES
WARN_IF_UNDOCUMENTED   = YES
WARN_AS_ERROR          = FAIL_ON_WARNINGS
GENERATE_HTML          = YES
GENERATE_LATEX         = NO
HTML_TIMESTAMP         = NO
HAVE_DOT               = NO
SHOW_NAMESPACES        = YES
SORT_MEMBER_DOCS       = NO
DOXYFILE
echo "reference: $output/html/index.html"
