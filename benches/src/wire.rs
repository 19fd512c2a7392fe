//! End to end: packets over a veth pair into a namespace, where something decides them.
//!
//! A lane is a namespace with one end of a veth pair and one contestant: an XDP program, a tc program, iptables, nft.
//! The injector sends packets over the other end, as a network card's driver would hand them in, all on one CPU, so
//! that the time of a run is the whole price of its packets.
//!
//! Contestants sit as early as they can: kernel rules in the raw table's PREROUTING, before connection tracking and
//! routing, which is where iptables is cheapest. What a contestant accepts goes on to a sink that drops everything
//! (the policy of the mangle table's PREROUTING) and counts it. That count must be exactly what the rules accept;
//! a lane where it isn't decided wrongly, and says so instead of giving a time. Packets that never reached the contestant
//! are told from those: a veth device drops what its ring has no room for while the kernel leaves its other end to a
//! thread (drivers/net/veth.c, `veth_xdp_xmit`), as it does under load, and counts them. Such a measurement is made anew.

use crate::driver::{BATCH, Injector, Pool};
use crate::kernel::Loaded;
use crate::machine::{Namespace, run};
use crate::trace::POOL;

/// How long one timed run takes, about: short enough for many rounds, long enough for the clock.
const RUN_NS: f64 = 15e6;

/// Least and most packets of a run.
const PACKETS: (u32, u32) = (4 * BATCH, 2 * POOL as u32);

/// Measurements that may lose packets before it is an error.
const TRIES: usize = 5;

/// The device in a lane.
pub(crate) const DEVICE: &str = "in0";

/// A namespace with a contestant.
pub(crate) struct Lane {
    /// What decides here.
    pub(crate) name: String,
    namespace: Namespace,
    /// The other end of its device, in this thread's namespace.
    end: String,
    ifindex: u32,
    /// Programs that are attached.
    programs: Vec<Loaded>,
    sent: Vec<u32>,
}

/// What was measured in a lane.
#[derive(Clone, Debug)]
pub(crate) struct Timed {
    /// Least ns a packet.
    pub(crate) ns: f64,
    /// Median over least.
    pub(crate) spread: f64,
    /// Packets that reached the sink, and that should have.
    pub(crate) accepted: (u64, u64),
}

/// Lanes and their injector.
pub(crate) struct Wire {
    injector: Injector,
    lanes: usize,
}

fn ifindex(device: &str) -> Result<u32, String> {
    let text = run(&["ip", "-o", "link", "show", "dev", device])?;
    let number = text.split(':').next().and_then(|number| number.trim().parse().ok());
    number.ok_or_else(|| format!("{device} has no number"))
}

impl Wire {
    /// Makes the injector, in this thread's namespace.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn new() -> Result<Wire, String> {
        run(&["ip", "link", "add", "inj0", "type", "veth", "peer", "name", "inj0p"])?;
        Ok(Wire { injector: Injector::new("inj0", ifindex("inj0")?)?, lanes: 0 })
    }

    /// Makes a lane that accepts everything.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn lane(&mut self, name: &str) -> Result<Lane, String> {
        self.lanes += 1;
        let namespace = Namespace::new(&format!("lane{}", self.lanes))?;
        let device = format!("w{}", self.lanes);
        let there = namespace.name();
        run(&[
            "ip",
            "link",
            "add",
            &device,
            "type",
            "veth",
            "peer",
            "name",
            DEVICE,
            "address",
            "02:00:00:00:00:0b",
            "netns",
            there,
        ])?;
        run(&["ip", "link", "set", &device, "up"])?;
        namespace.run(&["ip", "link", "set", DEVICE, "up"], "")?;
        // A veth device takes redirected packets if its peer has GRO or an XDP program.
        namespace.run(&["ethtool", "-K", DEVICE, "gro", "on"], "")?;
        namespace.run(&["iptables-legacy", "-w", "-t", "mangle", "-P", "PREROUTING", "DROP"], "")?;
        Ok(Lane {
            name: name.to_string(),
            namespace,
            ifindex: ifindex(&device)?,
            end: device,
            programs: Vec::new(),
            sent: Vec::new(),
        })
    }

    /// Sends the pool's packets through all lanes in turn, `rounds` times. `accepts` says of each packet of the pool
    /// whether the rules accept it.
    ///
    /// # Errors
    /// What the kernel says, or that packets were lost on their way again and again.
    pub(crate) fn measure(
        &mut self,
        lanes: &mut [Lane],
        pool: &Pool,
        accepts: &[bool],
        rounds: usize,
    ) -> Result<Vec<Timed>, String> {
        self.injector.fill(pool)?;
        for _ in 0..TRIES {
            let before = lanes.iter().map(Lane::lost).sum::<Result<u64, String>>()?;
            let times = self.try_measure(lanes, accepts, rounds)?;
            if lanes.iter().map(Lane::lost).sum::<Result<u64, String>>()? == before {
                return Ok(times);
            }
        }
        Err("the machine is too busy: packets were lost before anything decided them".into())
    }

    fn try_measure(
        &mut self,
        lanes: &mut [Lane],
        accepts: &[bool],
        rounds: usize,
    ) -> Result<Vec<Timed>, String> {
        let mut times = vec![Vec::new(); lanes.len()];
        let mut packets = Vec::new();
        for lane in lanes.iter_mut() {
            lane.sent.clear();
            lane.reset()?;
            // The first packets find everything cold and are slow; the second run sets the pace.
            lane.send(&mut self.injector, PACKETS.0)?;
            let pace = lane.send(&mut self.injector, PACKETS.0)?;
            let count = (RUN_NS / pace).clamp(f64::from(PACKETS.0), f64::from(PACKETS.1)) as u32;
            packets.push(count / BATCH * BATCH);
        }
        for _ in 0..rounds {
            for ((lane, times), &packets) in lanes.iter_mut().zip(&mut times).zip(&packets) {
                lane.send(&mut self.injector, (packets / 4).max(BATCH) / BATCH * BATCH)?;
                times.push(lane.send(&mut self.injector, packets)?);
            }
        }
        let mut before = vec![0u64; POOL + 1];
        for (at, &accept) in accepts.iter().enumerate() {
            before[at + 1] = before[at] + u64::from(accept);
        }
        let expected = |sent: &[u32]| {
            let of =
                |count: u32| before[POOL] * u64::from(count / POOL as u32) + before[count as usize % POOL];
            sent.iter().map(|&count| of(count)).sum()
        };
        lanes
            .iter()
            .zip(times)
            .map(|(lane, mut times)| {
                times.sort_by(f64::total_cmp);
                let accepted = (lane.sunk()?, expected(&lane.sent));
                Ok(Timed { ns: times[0], spread: times[times.len() / 2] / times[0], accepted })
            })
            .collect()
    }
}

impl Lane {
    /// Runs a command in the lane.
    ///
    /// # Errors
    /// What it printed.
    pub(crate) fn run(&self, command: &[&str], input: &str) -> Result<String, String> {
        self.namespace.run(command, input)
    }

    /// Attaches a program to the lane's device; `home` is the namespace to be in afterwards.
    ///
    /// # Errors
    /// What the kernel says.
    pub(crate) fn attach(&mut self, mut program: Loaded, home: &Namespace) -> Result<(), String> {
        self.namespace.enter()?;
        let attached = program.attach(DEVICE);
        home.enter()?;
        attached?;
        self.programs.push(program);
        Ok(())
    }

    fn send(&mut self, injector: &mut Injector, packets: u32) -> Result<f64, String> {
        self.sent.push(packets);
        injector.send(self.ifindex, packets)
    }

    fn reset(&self) -> Result<(), String> {
        self.run(&["iptables-legacy", "-w", "-t", "mangle", "-Z", "PREROUTING"], "").map(drop)
    }

    /// Packets that the lane's device had no room for, ever.
    fn lost(&self) -> Result<u64, String> {
        let text = run(&["ethtool", "-S", &self.end])?;
        let counts: Vec<u64> = text
            .lines()
            .filter_map(|line| line.split_once("_xdp_xmit_errors:")?.1.trim().parse().ok())
            .collect();
        if counts.is_empty() {
            return Err(format!("{} does not count the packets it has no room for", self.end));
        }
        Ok(counts.iter().sum())
    }

    /// Packets that the sink counted.
    fn sunk(&self) -> Result<u64, String> {
        let text = self.run(&["iptables-legacy-save", "-c", "-t", "mangle"], "")?;
        let line = text.lines().find(|line| line.starts_with(":PREROUTING"));
        let count = line.and_then(|line| line.split_once('[')?.1.split(':').next()?.parse().ok());
        count.ok_or_else(|| "the sink has no counter".into())
    }
}

impl Timed {
    /// Whether every packet was decided as it should be.
    pub(crate) fn is_right(&self) -> bool {
        self.accepted.0 == self.accepted.1
    }
}
