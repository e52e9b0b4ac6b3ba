# Becomes systemd as PID 1 of the namespaces that it is started in; see machine.py.
#
# machine.sh FOLDER: an empty folder to mount on. What is written stays in memory: the root is a
# copy-on-write overlay of this machine's.
set -eu
mount --make-rprivate /
share=$(mktemp -d)
mount --bind "$1" "$share"
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
cd "$1/root"
mount -t proc proc proc
# The kernel's settings are this machine's.
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=755 tmpfs dev
for name in null zero full random urandom tty; do
    touch "dev/$name"
    mount --bind "/dev/$name" "dev/$name"
done
mkdir dev/shm dev/pts run/host
ln -s /proc/self/fd dev/fd
mount -t tmpfs tmpfs dev/shm
mount --bind "$share" run/host
# Python may live in root's home; here, anybody may pass.
chmod a+x root
rm -rf etc/systemd/system/*.wants etc/shimpy var/lib/shimpy var/log/journal
# Kept on disk, there is one for each user, who may read it.
mkdir var/log/journal
for unit in systemd-sysctl systemd-modules-load systemd-remount-fs systemd-update-utmp; do
    ln -sf /dev/null "etc/systemd/system/$unit.service"
done
printf '[Unit]\nRequires=basic.target dbus.service\nAfter=basic.target dbus.service\n' \
    >etc/systemd/system/shimpy-test.target
mkdir old
pivot_root . old
umount -l old
ip link set lo up
exec env -i container=test "PATH=$PATH" NOTIFY_SOCKET=/run/host/notify \
    /lib/systemd/systemd --unit=shimpy-test.target --log-target=journal
