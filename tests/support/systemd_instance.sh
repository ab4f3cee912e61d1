# Runs a systemd of its own in new namespaces, and reads commands for its systemctl from standard input, one a line; each
# is answered by its output and a line "=<exit code>". Its /run is empty and private. Needs root. $1: folder of units.
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/system /run/user/0/systemd
chmod 700 /run/user/0
cp -r "$1" /run/user/0/systemd/user
export XDG_RUNTIME_DIR=/run/user/0 HOME=/run/user/0 XDG_CONFIG_HOME=/run/user/0/config
/lib/systemd/systemd --user --unit=basic.target &
until systemctl --user is-system-running --wait >/dev/null 2>&1; do sleep 0.1; done
echo =ready
while read -ra words; do
    systemctl --user "${words[@]}" 2>&1
    echo "=$?"
done
