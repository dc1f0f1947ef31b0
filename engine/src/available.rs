//! How much memory there is: what the machine has left, what the limits of a container leave of that, and what a
//! process has.
//!
//! Limits are those of Linux's control groups, of both versions: of the group that this process is in and of all
//! groups around it, as Docker and Kubernetes set them. Leaves out other systems, which say nothing here.

use std::fs;
use std::path::Path;

/// Memory that can be taken without swapping and within the limits of a container; `None` where the system does
/// not say.
pub fn available_memory_bytes() -> Option<u64> {
    within_groups(bytes_of("MemAvailable:", &fs::read_to_string("/proc/meminfo").ok()?))
}

/// The same with what the machine can swap out; a container's limit is one of memory.
pub(crate) fn memory_and_swap_bytes() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let swap = bytes_of("SwapFree:", &text).unwrap_or(0);
    within_groups(bytes_of("MemAvailable:", &text).map(|memory| memory.saturating_add(swap)))
}

/// What the groups of this process leave of the machine's memory.
fn within_groups(machine: Option<u64>) -> Option<u64> {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    machine.into_iter().chain(room_of_groups(&own, Path::new("/sys/fs/cgroup"))).min()
}

/// What the line of a file in `/proc` that begins with `key` says.
fn bytes_of(key: &str, text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

/// The names of a group's files: its limit, what it has, and in `memory.stat` the parts of that which are only a
/// cache of files.
struct Names {
    limit: &'static str,
    usage: &'static str,
    cache: [&'static str; 2],
}

const VERSION_1: Names = Names {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    cache: ["total_inactive_file", "total_active_file"],
};
const VERSION_2: Names =
    Names { limit: "memory.max", usage: "memory.current", cache: ["inactive_file", "active_file"] };

/// The least that is left in the groups of a process and around them: `own` is its `/proc/self/cgroup`, `root`
/// where groups are mounted. `None` where nothing is limited.
fn room_of_groups(own: &str, root: &Path) -> Option<u64> {
    let group = |line: &str| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        let path = path.trim_start_matches('/');
        let (root, names) = match controllers.split(',').any(|name| name == "memory") {
            true => (root.join("memory"), VERSION_1),
            false if controllers.is_empty() => (root.to_owned(), VERSION_2),
            false => return None,
        };
        let groups = Path::new(path).ancestors().map(|group| root.join(group));
        groups.filter_map(|group| room_of(&group, &names)).min()
    };
    own.lines().filter_map(group).min()
}

/// What a group's limit leaves, if it has one.
fn room_of(group: &Path, names: &Names) -> Option<u64> {
    let read = |name: &str| fs::read_to_string(group.join(name)).ok();
    // `max`, where there is none.
    let limit: u64 = read(names.limit)?.trim().parse().ok()?;
    let usage: u64 = read(names.usage)?.trim().parse().ok()?;
    let stat = read("memory.stat").unwrap_or_default();
    let part = |name: &&str| -> Option<u64> {
        stat.lines().find_map(|line| line.strip_prefix(*name)?.trim().parse().ok())
    };
    let cache: u64 = names.cache.iter().filter_map(part).sum();
    Some(limit.saturating_sub(usage.saturating_sub(cache)))
}

/// Memory of a process that is in RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResidentMemory {
    /// At the moment, in bytes.
    pub now_bytes: u64,
    /// The most at any time so far, in bytes.
    pub peak_bytes: u64,
}

impl ResidentMemory {
    /// That of this process; `None` where the system does not say.
    ///
    /// ```
    /// if let Some(memory) = engine::ResidentMemory::own() {
    ///     assert!(memory.peak_bytes >= memory.now_bytes);
    /// }
    /// ```
    pub fn own() -> Option<Self> {
        Self::read("/proc/self/status")
    }

    /// That of the process `id`; `None` if it is gone or the system does not say.
    pub fn of(id: u32) -> Option<Self> {
        Self::read(&format!("/proc/{id}/status"))
    }

    fn read(path: &str) -> Option<Self> {
        let text = fs::read_to_string(path).ok()?;
        let bytes = |key| bytes_of(key, &text);
        Some(Self { now_bytes: bytes("VmRSS:")?, peak_bytes: bytes("VmHWM:")? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tightest_group_around_a_process_counts() {
        let root = std::env::temp_dir().join(format!("engine-cgroups-{}", std::process::id()));
        let write = |name: &str, text: &str| {
            let path = root.join(name);
            fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
            fs::write(path, text).expect("a file");
        };
        let own = "12:cpu,cpuacct:/a\n0::/pod/container\n";
        assert_eq!(room_of_groups(own, &root), None, "nothing is mounted");
        write("pod/container/memory.max", "max\n");
        write("pod/container/memory.current", "700\n");
        assert_eq!(room_of_groups(own, &root), None, "nothing is limited");
        write("pod/memory.max", "5000\n");
        write("pod/memory.current", "3000\n");
        write("pod/memory.stat", "anon 100\ninactive_file 1400\nactive_file 100\n");
        assert_eq!(room_of_groups(own, &root), Some(5000 - 3000 + 1500));
        write("pod/container/memory.max", "1000\n");
        assert_eq!(room_of_groups(own, &root), Some(300));
        write("pod/container/memory.current", "1200\n");
        assert_eq!(room_of_groups(own, &root), Some(0));
        // The first version, whose mount shows the container's own group as the root.
        write("memory/memory.limit_in_bytes", "9000\n");
        write("memory/memory.usage_in_bytes", "4000\n");
        write("memory/memory.stat", "inactive_file 1\ntotal_inactive_file 2000\n");
        let first = "11:memory:/docker/0123\n4:cpuset:/\n";
        assert_eq!(room_of_groups(first, &root), Some(7000));
        fs::remove_dir_all(&root).expect("removed");
    }
}
