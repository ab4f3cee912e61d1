# Carries out the build and the run of a Dockerfile without Docker, in new namespaces. Needs root. Debian's /usr stands in
# for the base image, read-only.
#   $1  folder of the roots
#   $2  script with the commands of the build stage, run in its root
#   $3  folder of the build context's files as they are copied
#   $4  user:group of the last stage
#   $5  read-only folder of secrets, mounted at /run/secrets
#   …   NAME=value … command …, of the last stage
set -euo pipefail
folder=$1 build=$2 context=$3 user=$4 secrets=$5
shift 5

base() { # a root with Debian's programs, and empty folders
    mkdir -p "$1"
    mount -t tmpfs tmpfs "$1"
    mkdir -p "$1"/{usr,etc,proc,dev,opt/imstream,base,run/secrets}
    for name in bin sbin lib lib64; do ln -s "usr/$name" "$1/$name"; done
    for name in usr etc; do mount --bind /$name "$1/$name" && mount -o remount,bind,ro "$1/$name"; done
    mount --rbind /dev "$1/dev"
    ln -s /usr/bin/python3 "$1/base/python"
}

base "$folder/build"
mkdir -p "$folder/build"/{src,tmp,root}
cp -r "$context/." "$folder/build/src"
cp "$build" "$folder/build/build.sh"
PATH=/base:/usr/bin:/usr/sbin HOME=/root chroot "$folder/build" /bin/bash -euc 'cd /src; . /build.sh' >&2

base "$folder/node"
cp -r "$folder/build/opt/imstream" "$folder/node/opt"
mount --bind "$secrets" "$folder/node/run/secrets"
for shell in sh dash bash; do mount --bind /dev/null "$folder/node/usr/bin/$shell"; done
mount -o remount,ro "$folder/node"
settings=()
while [[ $1 == *=* ]]; do settings+=("$1"); shift; done
# env and chroot replace themselves: the command is process 1.
exec unshare --pid --fork --kill-child --mount-proc="$folder/node/proc" \
    /usr/bin/env --ignore-environment "${settings[@]}" /usr/sbin/chroot --userspec="$user" --groups= "$folder/node" "$@"
