#!/usr/bin/env bash
# OpenCV's wheel needs two system libraries that a bare machine may lack.
set -eu
python=$1
"$python" -c 'import cv2' 2>/dev/null && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq && apt-get install -y -qq libgl1 libglib2.0-0
    "$python" -c 'import cv2' && exit 0
fi
"$python" -c 'import cv2' || true
echo 'OpenCV cannot be imported: install libGL and glib (Debian, Ubuntu: sudo apt-get install libgl1 libglib2.0-0)'
exit 1
