//! What every benchmark here needs: its options, and drivers on devices in a network namespace of their own.

use std::collections::BTreeMap;
use std::path::PathBuf;

use polc_backend_ebpf::object::ProgramKind;

use crate::driver::Driver;
use crate::machine::{Namespace, run};
use crate::packet::Form;
use crate::wire::Wire;

/// Median over least time of the empty program above which a run's numbers are marked as noisy.
pub(crate) const NOISY: f64 = 1.15;

/// How to measure.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// Fewer sizes, sets and rounds.
    pub(crate) quick: bool,
    /// Rounds of which the least time counts.
    pub(crate) rounds: usize,
    /// The seed of everything random.
    pub(crate) seed: u64,
    /// Rule sets beside the checkout.
    pub(crate) rulesets: Option<PathBuf>,
    /// Only rule sets whose name contains this.
    pub(crate) set: Option<String>,
    /// Only this many rules.
    pub(crate) size: Option<usize>,
}

/// Options, drivers, and how noisy it was.
pub(crate) struct Context {
    /// How to measure.
    pub(crate) options: Options,
    drivers: BTreeMap<(u8, Form), Driver>,
    /// The worst spread seen so far.
    pub(crate) spread: f64,
    devices: usize,
    wire: Option<Wire>,
    home: Namespace,
}

impl Context {
    /// Makes a namespace and moves this thread into it.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn new(options: Options) -> Result<Context, String> {
        let namespace = Namespace::new("driver")?;
        namespace.enter()?;
        Ok(Context {
            options,
            drivers: BTreeMap::new(),
            spread: 1.0,
            devices: 0,
            wire: None,
            home: namespace,
        })
    }

    /// The driver of that kind, for pools of that form.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn driver(&mut self, kind: ProgramKind, form: Form) -> Result<&mut Driver, String> {
        let key = (kind as u8, form);
        if !self.drivers.contains_key(&key) {
            let device = format!("drv{}", self.devices);
            self.devices += 1;
            run(&["ip", "link", "add", &device, "type", "veth", "peer", "name", &format!("{device}p")])?;
            self.drivers.insert(key, Driver::new(kind, form, &device)?);
        }
        Ok(self.drivers.get_mut(&key).expect("inserted above"))
    }

    /// The injector, and the namespace that this thread is in.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn wire(&mut self) -> Result<(&mut Wire, &Namespace), String> {
        if self.wire.is_none() {
            self.wire = Some(Wire::new()?);
        }
        Ok((self.wire.as_mut().expect("made above"), &self.home))
    }

    /// Notes how noisy a measurement was.
    pub(crate) fn note(&mut self, spread: f64) {
        self.spread = self.spread.max(spread);
    }
}

/// Says what is being done.
pub(crate) fn progress(text: &str) {
    eprintln!("{text}");
}
