#!/usr/bin/env bash
# Downloads the official binary CIFAR archive, verifies it by its checksum and unpacks it.
#
# Usage: download.sh [cifar10|cifar100] DIR
#
# Afterwards: microreg_cifar --data DIR [--dataset cifar100]. An archive that is there already and verifies is not
# downloaded again. MICROREG_CIFAR_URL names another place that holds the archives (a mirror, file:///some/folder).
set -euo pipefail

usage() {
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
}
fail() {
  echo "download.sh: error: $*" >&2
  exit 1
}

case "${1:-}" in
  -h | --help) usage; exit 0 ;;
  cifar10 | cifar100) dataset=$1; shift ;;
  *) dataset=cifar10 ;;
esac
if [ $# -ne 1 ]; then
  usage >&2
  exit 2
fi
folder=$1

if [ "$dataset" = cifar10 ]; then
  archive=cifar-10-binary.tar.gz
  checksum=c32a1d4ab5d03f1284b67883e8d87530
else
  archive=cifar-100-binary.tar.gz
  checksum=03b5dce01913d631647c71ecec9e9cb8
fi
checksum=${MICROREG_CIFAR_MD5:-$checksum}
url=${MICROREG_CIFAR_URL:-https://www.cs.toronto.edu/~kriz}/$archive
file=$folder/$archive

mkdir -p "$folder" || fail "$folder cannot be made"
verified() {
  [ -f "$1" ] && [ "$(md5sum < "$1" | cut -d ' ' -f 1)" = "$checksum" ]
}
if ! verified "$file"; then
  echo "downloading $url"
  if command -v curl > /dev/null; then
    curl --fail --location --retry 3 --output "$file.part" "$url" || fail "$url could not be downloaded"
  elif command -v wget > /dev/null; then
    wget --output-document "$file.part" "$url" || fail "$url could not be downloaded"
  else
    fail "neither curl nor wget is installed"
  fi
  if ! verified "$file.part"; then
    found=$(md5sum < "$file.part" | cut -d ' ' -f 1)
    rm -f "$file.part"
    fail "$url has the checksum $found, expected $checksum: the download is damaged or was replaced; try again"
  fi
  mv "$file.part" "$file"
fi
tar -xzf "$file" -C "$folder"
echo "$dataset is ready: microreg_cifar --data $folder --dataset $dataset"
