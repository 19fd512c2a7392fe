//! The machine: a CPU of our own, network namespaces of our own, what to say about it in a report.

use std::fs;
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use rustix::thread::{
    CpuSet, LinkNameSpaceType, move_into_link_name_space, sched_getaffinity, sched_setaffinity,
};

/// Runs a command.
///
/// # Errors
/// It can't be started, or what it printed when it failed.
pub(crate) fn run(command: &[&str]) -> Result<String, String> {
    run_with(command, "")
}

/// Runs a command with that input.
///
/// # Errors
/// It can't be started, or what it printed when it failed.
pub(crate) fn run_with(command: &[&str], input: &str) -> Result<String, String> {
    use std::io::Write as _;
    let [name, arguments @ ..] = command else { return Err("no command".into()) };
    let shown = || command.join(" ");
    let mut child = Command::new(name)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("{}: {error}", shown()))?;
    let stdin = child.stdin.take();
    let output = std::thread::scope(|scope| {
        // In a thread of its own: a command may print more than a pipe holds before it has read everything.
        let writer = scope.spawn(move || stdin.map(|mut pipe| pipe.write_all(input.as_bytes())));
        let output = child.wait_with_output();
        _ = writer.join();
        output
    });
    let output = output.map_err(|error| format!("{}: {error}", shown()))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr).trim().to_string();
        return Err(format!("{}: {}", shown(), text.chars().take(300).collect::<String>()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A network namespace, removed when dropped.
pub(crate) struct Namespace {
    name: String,
}

impl Namespace {
    /// Makes one.
    ///
    /// # Errors
    /// What `ip` says.
    pub(crate) fn new(suffix: &str) -> Result<Namespace, String> {
        let name = format!("polc-bench-{}-{suffix}", std::process::id());
        run(&["ip", "netns", "add", &name])?;
        Ok(Namespace { name })
    }

    /// Runs a command in it, with that input.
    ///
    /// # Errors
    /// As [`run_with`].
    pub(crate) fn run(&self, command: &[&str], input: &str) -> Result<String, String> {
        let net = format!("--net=/run/netns/{}", self.name);
        let mut all = vec!["nsenter", net.as_str()];
        all.extend(command);
        run_with(&all, input)
    }

    /// Its name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Moves this thread into it; commands and threads started from here on are in it, too.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn enter(&self) -> Result<(), String> {
        let path = format!("/run/netns/{}", self.name);
        let file = fs::File::open(&path).map_err(|error| format!("{path}: {error}"))?;
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
            .map_err(|error| format!("{path}: {error}"))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        _ = run(&["ip", "netns", "delete", &self.name]);
    }
}

/// The CPUs that this process had before its thread was kept on one.
static ALL_CPUS: OnceLock<CpuSet> = OnceLock::new();

/// Keeps this thread on the last CPU, where fewer interrupts are handled than on the first.
///
/// # Errors
/// What the kernel says.
pub(crate) fn pin() -> Result<usize, String> {
    let all = sched_getaffinity(None).map_err(|error| format!("asking for CPUs: {error}"))?;
    let all = ALL_CPUS.get_or_init(|| all);
    let cpu = (0..CpuSet::MAX_CPU).rev().find(|&cpu| all.is_set(cpu)).ok_or("there is no CPU")?;
    let mut set = CpuSet::new();
    set.set(cpu);
    keep_on(&set)?;
    Ok(cpu)
}

fn keep_on(cpus: &CpuSet) -> Result<(), String> {
    sched_setaffinity(None, cpus).map_err(|error| format!("choosing CPUs: {error}"))
}

/// Does something with all CPUs, as it is done where nothing is measured beside it; threads and commands that it starts
/// have them, too.
///
/// # Errors
/// What the kernel says.
pub(crate) fn on_all_cpus<T>(run: impl FnOnce() -> T) -> Result<T, String> {
    let own = sched_getaffinity(None).map_err(|error| format!("asking for CPUs: {error}"))?;
    keep_on(ALL_CPUS.get().unwrap_or(&own))?;
    let result = run();
    keep_on(&own)?;
    Ok(result)
}

fn line_of(path: &str, key: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.starts_with(key))?;
    Some(line.split_once(':')?.1.trim().to_string())
}

/// Processor, CPUs, memory, kernel.
pub(crate) fn describe() -> String {
    let model = line_of("/proc/cpuinfo", "model name").unwrap_or_else(|| "unknown processor".into());
    let cache = line_of("/proc/cpuinfo", "cache size").unwrap_or_default();
    let cpus = ALL_CPUS.get().map_or(1, CpuSet::count);
    let memory = line_of("/proc/meminfo", "MemTotal")
        .and_then(|text| text.split(' ').next()?.parse::<u64>().ok())
        .map_or_else(String::new, |kib| format!(", {} GB", (kib + (1 << 19)) >> 20));
    let hypervisor = match line_of("/proc/cpuinfo", "flags") {
        Some(flags) if flags.split(' ').any(|flag| flag == "hypervisor") => ", a virtual machine",
        _ => "",
    };
    let kernel = rustix::system::uname();
    let release = kernel.release().to_string_lossy().into_owned();
    format!("{model} ({cache} cache), {cpus} CPUs{memory}{hypervisor}; Linux {release}")
}

/// Processes that could run, on average over the last minute.
pub(crate) fn load_average() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|first| first.parse().ok()).unwrap_or(0.0)
}
