//! `polc serve-metrics`: what applied policies count, for Prometheus and whatever else reads OpenMetrics.
//!
//! Everything is read from the kernel when somebody asks, so a scrape costs what `polc save -c` costs and nothing
//! between scrapes. That nothing is applied is no failure here: policies come and go under a daemon.

use std::fmt;
use std::net::TcpListener;
use std::os::fd::AsFd as _;
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use polc_backend_ebpf::trace::Tally;
use polc_ir::hook::Family;
use polc_loader::events::{self, TraceMaps};
use polc_loader::status::Open;
use polc_loader::sys::Sys;
use polc_loader::{Error, counters};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use super::applied::{self, Followed, Opened};
use super::{live, status};
use crate::cli::MetricsArgs;
use crate::failure::Failure;
use crate::http::{self, Answer};
use crate::output::Output;

/// Longest wait for a request or a signal at once.
const TICK: Duration = Duration::from_secs(60);
/// Media type of what is served (OpenMetrics 1.0, "Content type").
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Labels and their values.
type Labels = Vec<(&'static str, String)>;

pub(super) fn run(args: &MetricsArgs, output: &Output) -> Result<ExitCode, Failure> {
    let sys = Sys::new();
    // What keeps this from reading any policy is told now rather than with every scrape.
    let opened = applied::open_all(&sys, &args.slots, output)?;
    if opened.policies.is_empty() {
        live::all_well(opened.failed, output)?;
    }
    let served = Served { sys: &sys, args, output, followed: Followed::default(), told: Vec::new() };
    let served = Mutex::new(served);
    let answer = |method: &str, target: &str| {
        served.lock().unwrap_or_else(PoisonError::into_inner).answer(method, target)
    };
    // The server's threads inherit that signals are waited for.
    let signals = sys.signals().map_err(Error::call("wait for signals"))?;
    let listener = TcpListener::bind(args.listen).and_then(|listener| {
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        Ok((listener, address))
    });
    let (listener, address) = listener.map_err(Error::call(format!("listen on {}", args.listen)))?;
    output.remark(&format!("serving metrics on http://{address}/metrics\n"));
    http::serve(&listener, &answer, || {
        let ready = sys.wait_readable(&[listener.as_fd(), signals.as_fd()], None, TICK);
        Ok::<bool, Failure>(ready.map_err(Error::call("wait for requests"))?[1])
    })?;
    Ok(ExitCode::SUCCESS)
}

/// What is served.
struct Served<'a> {
    sys: &'a Sys,
    args: &'a MetricsArgs,
    output: &'a Output,
    followed: Followed,
    /// What was told of policies that can't be read.
    told: Vec<String>,
}

impl Served<'_> {
    /// The answer to a request.
    fn answer(&mut self, method: &str, target: &str) -> Answer {
        let path = target.split('?').next().unwrap_or_default();
        match (method, path) {
            ("GET" | "HEAD", "/metrics") => match self.text() {
                Ok(body) => Answer { status: "200 OK", headers: vec![("Content-Type", OPEN_METRICS)], body },
                Err(failure) => {
                    self.output.error(&failure.to_string());
                    Answer::new("500 Internal Server Error", format!("{failure}\n"))
                }
            },
            ("GET" | "HEAD", "/") => Answer::new("200 OK", "polc's metrics are at /metrics\n"),
            ("GET" | "HEAD", _) => Answer::new("404 Not Found", "metrics are at /metrics\n"),
            _ => {
                let mut answer = Answer::new("405 Method Not Allowed", "only GET\n");
                answer.headers.push(("Allow", "GET, HEAD"));
                answer
            }
        }
    }

    /// The text of now. Policies that can't be read are told when that changes, and left out.
    fn text(&mut self) -> Result<String, Failure> {
        let Opened { policies, failed, .. } = self.followed.refresh(self.sys, &self.args.slots)?;
        let failures: Vec<String> = failed.iter().map(ToString::to_string).collect();
        for failure in failures.iter().filter(|failure| !self.told.contains(failure)) {
            self.output.error(failure);
        }
        let text = exposition(self.sys, policies, failures.len());
        self.told = failures;
        text
    }
}

/// The OpenMetrics text for policies.
fn exposition(sys: &Sys, policies: &[Open], unread: usize) -> Result<String, Failure> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Scrape::new(sys, policies, unread)?));
    let mut out = String::new();
    text::encode(&mut out, &registry).expect("writing to a string succeeds");
    Ok(out)
}

/// A metric's samples.
#[derive(Debug)]
struct Samples {
    name: &'static str,
    help: &'static str,
    kind: MetricType,
    samples: Vec<(Labels, u64)>,
}

/// Everything that is told in one scrape.
#[derive(Debug)]
struct Scrape {
    policies: Vec<Labels>,
    metrics: Vec<Samples>,
}

impl Scrape {
    fn new(sys: &Sys, policies: &[Open], unread: usize) -> Result<Scrape, Error> {
        let metric = |kind: MetricType, name, help| Samples { name, help, kind, samples: Vec::new() };
        let counter = |name, help| metric(MetricType::Counter, name, help);
        let gauge = |name, help| metric(MetricType::Gauge, name, help);
        let mut count = gauge("polc_policies", "Applied policies");
        count.samples.push((Labels::new(), policies.len() as u64));
        let mut damaged = gauge("polc_policies_unread", "Applied policies that can't be read");
        damaged.samples.push((Labels::new(), unread as u64));
        let mut applied =
            gauge("polc_policy_applied_timestamp_seconds", "When the policy was applied, since 1970");
        let mut suspended =
            gauge("polc_policy_suspended", "1 while every packet is left to the kernel's own rules");
        let mut insns =
            gauge("polc_program_instructions", "Instructions of the program, as the verifier left them");
        let mut jited = gauge("polc_program_machine_code_bytes", "Machine code of the program");
        let mut packets = counter("polc_packets", "Packets that the attached program decided, by verdict");
        let mut bytes = counter("polc_bytes", "Their bytes, from the IP header on");
        let mut rule_packets = counter("polc_rule_packets", "Packets that a rule or policy counted");
        let mut rule_bytes = counter("polc_rule_bytes", "Bytes that a rule or policy counted");
        let mut entries = gauge("polc_map_entries", "Elements in use of a map");
        let mut entries_max = gauge("polc_map_entries_max", "Most elements of a map");
        let mut map_bytes = gauge("polc_map_bytes", "Bytes of a map's keys and values, for all CPUs");
        let mut reports = counter(
            "polc_reports",
            "Packets that `polc trace` asked for, by result: reported, or not because of its rate or a full buffer",
        );
        let mut infos = Vec::new();
        for policy in policies {
            let place = place(policy);
            let with = |more: &[(&'static str, &str)]| -> Labels {
                place
                    .iter()
                    .cloned()
                    .chain(more.iter().map(|(name, value)| (*name, value.to_string())))
                    .collect()
            };
            let program = &policy.program;
            infos.push(with(&[
                ("mode", &policy.generation.mode.map_or_else(String::new, |mode| mode.to_string())),
                ("source", &policy.generation.source),
                ("generation", &policy.number.to_string()),
                ("via", status::via(policy)),
                ("program_id", &program.id.to_string()),
                ("program_tag", &status::tag(policy)),
            ]));
            applied.samples.push((place.clone(), policy.generation.applied));
            if let Some(is_suspended) = policy.is_suspended(sys)? {
                suspended.samples.push((place.clone(), u64::from(is_suspended)));
            }
            insns.samples.push((place.clone(), u64::from(program.xlated_bytes / 8)));
            jited.samples.push((place.clone(), u64::from(program.jited_bytes)));
            let verdicts = counters::by_verdict(&policy.object.manifest, &counters::by_slot(sys, policy)?);
            for (verdict, counter) in verdicts.named() {
                packets.samples.push((with(&[("verdict", verdict)]), counter.packets));
                bytes.samples.push((with(&[("verdict", verdict)]), counter.bytes));
            }
            for (counted, counter) in counters::by_rule(sys, policy)? {
                if !applied::is_users(counted) {
                    continue;
                }
                let number = counted.rule.map_or_else(|| "policy".to_string(), |number| number.to_string());
                let labels = with(&[
                    ("table", &counted.table),
                    ("chain", &counted.chain),
                    ("rule", &number),
                    ("text", counted.text.trim()),
                ]);
                rule_packets.samples.push((labels.clone(), counter.packets));
                rule_bytes.samples.push((labels, counter.bytes));
            }
            for fill in policy.fills(sys)? {
                let labels = with(&[("map", fill.name)]);
                if let Some(used) = fill.entries {
                    entries.samples.push((labels.clone(), u64::from(used)));
                    entries_max.samples.push((labels.clone(), u64::from(fill.map.info().max_entries)));
                }
                map_bytes.samples.push((labels, fill.bytes()));
            }
            if let Some(maps) = TraceMaps::of(&policy.object.manifest, |name| policy.map(name)) {
                let Tally { reported, limited, full } = events::tally(sys, maps)?;
                for (result, count) in [("reported", reported), ("over_rate", limited), ("buffer_full", full)]
                {
                    reports.samples.push((with(&[("result", result)]), count));
                }
            }
        }
        let metrics = vec![
            count,
            damaged,
            applied,
            suspended,
            insns,
            jited,
            packets,
            bytes,
            rule_packets,
            rule_bytes,
            entries,
            entries_max,
            map_bytes,
            reports,
        ];
        Ok(Scrape { policies: infos, metrics })
    }
}

/// The labels that tell a policy from the others.
fn place(policy: &Open) -> Labels {
    let slot = &policy.slot;
    let mut labels = vec![("attach", slot.attach.to_string())];
    labels.extend(slot.device.clone().map(|device| ("device", device)));
    labels.extend(slot.hook.map(|hook| ("hook", hook.to_string())));
    labels.push(("family", if slot.family == Family::V4 { "4" } else { "6" }.to_string()));
    labels
}

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let help = "An applied policy and its program";
        let mut info = encoder.encode_descriptor("polc_policy", help, None, MetricType::Info)?;
        for labels in &self.policies {
            info.encode_info(labels)?;
        }
        for Samples { name, help, kind, samples } in &self.metrics {
            let mut metric = encoder.encode_descriptor(name, help, None, *kind)?;
            for (labels, value) in samples {
                let sample = metric.encode_family(labels)?;
                match kind {
                    MetricType::Counter => ConstCounter::new(*value).encode(sample)?,
                    _ => ConstGauge::new(*value as i64).encode(sample)?,
                }
            }
        }
        Ok(())
    }
}
