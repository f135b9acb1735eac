#!/usr/bin/env bash
# Install the system packages that some tests need: by apt, as root, where they are missing. Where
# they cannot be had, those tests say so and are skipped; with CI=true they fail.
# Google's google-cloud-cli, which those of TPUs need too, is not in Debian's archive: it comes from
# https://cloud.google.com/sdk/docs/install
set -euo pipefail
packages=(slurmctld slurmd slurm-client munge openssh-server openssh-client)
missing=()
for package in "${packages[@]}"; do
  dpkg-query --show --showformat='${Status}\n' "$package" 2>/dev/null | grep -q ' installed$' ||
    missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ] || [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then exit 0; fi
echo "installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
# Their services are not to be started: the tests start daemons of their own.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
  printf '#!/bin/sh\nexit 101\n' >$policy
  chmod +x $policy
  trap 'rm -f /usr/sbin/policy-rc.d' EXIT
fi
{ apt-get update && apt-get install --yes --no-install-recommends "${missing[@]}"; } >/dev/null ||
  echo "could not install ${missing[*]}" >&2
