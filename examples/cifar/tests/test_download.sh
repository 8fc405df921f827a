#!/usr/bin/env bash
# download.sh against a local archive: a right one is unpacked, a damaged one refused and not kept.
set -euo pipefail

script=$(cd "$(dirname "$0")/.." && pwd)/download.sh
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if ! command -v curl > /dev/null; then
  echo "skipped: curl is not installed"  # wget does not read file:// addresses
  exit 0
fi

mkdir -p "$folder/mirror" "$folder/source/cifar-10-batches-bin"
echo content > "$folder/source/cifar-10-batches-bin/test_batch.bin"
tar -czf "$folder/mirror/cifar-10-binary.tar.gz" -C "$folder/source" cifar-10-batches-bin
export MICROREG_CIFAR_URL=file://$folder/mirror

if "$script" cifar10 "$folder/official" 2> "$folder/error"; then
  echo "an archive with a checksum that is not the official one was accepted" >&2
  exit 1
fi
grep -q 'expected c32a1d4ab5d03f1284b67883e8d87530' "$folder/error"
[ -z "$(ls "$folder/official")" ]

MICROREG_CIFAR_MD5=$(md5sum < "$folder/mirror/cifar-10-binary.tar.gz" | cut -d ' ' -f 1)
export MICROREG_CIFAR_MD5
"$script" "$folder/right"
cmp "$folder/right/cifar-10-batches-bin/test_batch.bin" "$folder/source/cifar-10-batches-bin/test_batch.bin"

rm -r "$folder/mirror"  # The archive is there and verifies: nothing is fetched.
"$script" "$folder/right"
echo "download.sh: all checks passed"
