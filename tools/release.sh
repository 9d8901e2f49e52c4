#!/usr/bin/env bash
# Check, build and tag the version in settings.ini; uploads nothing. SKIP_CHECKS=1 leaves the checks out.
set -eu
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
version=$(sed -n 's/^version *= *//p' settings.ini)
stop() { echo "no release: $1" >&2; exit 1; }

[ -z "$(git status --porcelain)" ] || stop 'the checkout has changes; commit or remove them (git status)'
! git rev-parse -q --verify "refs/tags/v$version" >/dev/null || stop "v$version is a tag already; raise version in settings.ini"
notes=$(awk -v head="## [$version]" 'index($0, head) == 1 {on = 1; next} /^## / {on = 0} on' CHANGELOG.md)
[ -n "${notes//[[:space:]]/}" ] || stop "CHANGELOG.md says nothing under '## [$version]'"
grep -q "\"$version\"" reidlit/__init__.py || stop "reidlit/__init__.py has another version; run nbdev_export"
[ "${SKIP_CHECKS:-}" = 1 ] || bash tools/check.sh
rm -rf dist build
python -m build --no-isolation >/dev/null
[ -z "$(git status --porcelain)" ] || stop 'checks or build changed files (git status)'
git tag -a "v$version" --cleanup=verbatim -m "reidlit $version" -m "$notes"
ls dist
echo "tagged v$version; nothing was uploaded. To publish: git push origin v$version"
