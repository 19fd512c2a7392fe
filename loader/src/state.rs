//! What polc keeps about an applied policy: where, as which files and pins, and what it was about to do.
//!
//! A *slot* is a place that one policy can be applied to: an attach point of a device for one address family, in one
//! network namespace. A *generation* is one applied object. The kernel is the truth: a slot's generation is the one whose
//! program is attached, whatever the file says. So no two things ever have to change at once, and whoever comes after a
//! crash only asks the kernel which generation won and removes the rest ([`crate::swap`]).
//!
//! Where it is kept, and twice, is [`crate::store`]'s.

use std::collections::BTreeMap;
use std::fmt;

use polc_ir::env::{Attach, Mode};
use polc_ir::hook::{Family, Hook};
use serde::{Deserialize, Serialize};

/// Version of the state file. A file of another version is not touched.
pub const STATE_VERSION: u32 = 1;

/// A place that one policy can be applied to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SlotName {
    /// The device; none for hooks, which see those of all devices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The attach point.
    pub attach: Attach,
    /// The hook of a netfilter program.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hook: Option<Hook>,
    /// The family whose packets it decides.
    pub family: Family,
}

impl SlotName {
    /// The name of its directories. bpffs takes no dots in names.
    pub fn directory(&self) -> String {
        let place = match (&self.device, self.hook) {
            (Some(device), _) => device.replace('%', "%25").replace('.', "%2e"),
            (None, Some(hook)) => hook.to_string(),
            (None, None) => "all".to_string(),
        };
        format!("{place}-{}-{}", self.attach, if self.family == Family::V4 { 4 } else { 6 })
    }

    /// The slot whose directories have a name, if it is one of [`Self::directory`].
    pub(crate) fn of_directory(directory: &str) -> Option<SlotName> {
        let (rest, family) = directory.rsplit_once('-')?;
        let family = match family {
            "4" => Family::V4,
            "6" => Family::V6,
            _ => return None,
        };
        let places = [Attach::Xdp, Attach::TcIngress, Attach::TcEgress, Attach::Netfilter];
        let (place, attach) = places.into_iter().find_map(|attach| {
            let place = rest.strip_suffix(&attach.to_string())?.strip_suffix('-')?;
            Some((place, attach))
        })?;
        let name = if attach == Attach::Netfilter {
            let hook = Hook::ALL.into_iter().find(|hook| hook.to_string() == place);
            SlotName { device: None, attach, hook, family }
        } else {
            let device = place.replace("%2e", ".").replace("%25", "%");
            SlotName { device: Some(device), attach, hook: None, family }
        };
        (name.directory() == directory).then_some(name)
    }
}

impl fmt::Display for SlotName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at {}", self.attach)?;
        if let Some(hook) = self.hook {
            write!(f, " {hook}")?;
        }
        if let Some(device) = &self.device {
            write!(f, " of `{device}`")?;
        }
        write!(f, " for {}", self.family)
    }
}

/// How a generation's program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Via {
    /// By a link that all generations share.
    Link,
    /// By a filter on the `clsact` qdisc.
    Clsact {
        /// The filter's priority.
        priority: u16,
    },
    /// By a link that all generations share, to a program that goes on with the current one's ([`crate::dispatch`]).
    Dispatch {
        /// The link's priority among the hook's functions.
        priority: i32,
        /// Whether fragments are reassembled first.
        defrag: bool,
    },
}

/// One applied object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Generation {
    /// The program's number in the kernel.
    pub program_id: u32,
    /// When it was applied, in seconds since 1970.
    pub applied: u64,
    /// How it is deployed.
    pub mode: Option<Mode>,
    /// What it was compiled from, for people.
    pub source: String,
    /// Packets and bytes to add to what the program counted, by the manifest's `counted`: what earlier generations
    /// counted for the same rules.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub carried: Vec<(u64, u64)>,
    /// Whether `carried` is final. Until then the generation before is kept.
    #[serde(default)]
    pub settled: bool,
}

/// A change that was begun.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Intent {
    /// The generation attached before; none if nothing was.
    pub from: Option<u32>,
    /// The one to be attached; none to attach nothing.
    pub to: Option<u32>,
    /// When to go back unless confirmed; none if the change needs no confirmation.
    pub confirm: Option<Confirm>,
    /// The slots at other hooks that change at once with this one, and to which generations: such changes are confirmed,
    /// and go back, together.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub with: Vec<(SlotName, u32)>,
}

/// A change that goes back by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Confirm {
    /// When it goes back, in milliseconds since boot.
    pub deadline_ms: u64,
    /// Tells this change from every other.
    pub token: String,
}

/// What is kept about a slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SlotState {
    /// [`STATE_VERSION`].
    pub version: u32,
    /// The slot.
    pub slot: SlotName,
    /// Number of the device when it was attached.
    pub ifindex: u32,
    /// How it is attached.
    pub via: Via,
    /// Its generations: the one attached, and those about to come or go.
    pub generations: BTreeMap<u32, Generation>,
    /// A change that was begun and not ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub intent: Option<Intent>,
    /// The generation whose coming was confirmed; none if another change was begun since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confirmed: Option<u32>,
}

impl SlotState {
    /// The state of a slot from its text; `Err`: why it is none.
    pub(crate) fn read(bytes: &[u8], slot: &SlotName) -> Result<SlotState, String> {
        let state: SlotState = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        if state.version != STATE_VERSION {
            return Err(format!("it has version {}, and this polc reads {STATE_VERSION}", state.version));
        }
        if state.slot != *slot {
            return Err(format!("it is that of the policy {}", state.slot));
        }
        Ok(state)
    }

    /// Its text.
    pub(crate) fn text(&self) -> String {
        serde_json::to_string_pretty(self).expect("plain data serializes")
    }

    /// What going back needs of it, in a few hundred bytes: all but what the generations come from and counted.
    pub(crate) fn note(&self) -> String {
        let mut state = self.clone();
        for generation in state.generations.values_mut() {
            generation.source = LOST.to_string();
            generation.carried.clear();
        }
        serde_json::to_string(&state).expect("plain data serializes")
    }

    /// The generation whose program has a number.
    pub fn generation_of(&self, program_id: u32) -> Option<u32> {
        let mut all = self.generations.iter();
        all.find(|(_, generation)| generation.program_id == program_id).map(|(number, _)| *number)
    }

    /// What has to be confirmed of the generation attached, if anything.
    pub fn unconfirmed(&self, current: u32) -> Option<&Confirm> {
        let intent = self.intent.as_ref().filter(|intent| intent.to == Some(current))?;
        intent.confirm.as_ref()
    }
}

/// What generations come from whose state was lost.
pub(crate) const LOST: &str = "unknown: the state was lost";

#[cfg(test)]
mod tests {
    use super::*;

    fn name(device: &str) -> SlotName {
        SlotName { device: Some(device.into()), attach: Attach::Xdp, hook: None, family: Family::V4 }
    }

    #[test]
    fn directories_name_their_slots() {
        let of = |device: Option<&str>, attach, hook, family| SlotName {
            device: device.map(String::from),
            attach,
            hook,
            family,
        };
        for name in [
            of(Some("eth0"), Attach::Xdp, None, Family::V4),
            of(Some("a-tc-ingress-4"), Attach::TcEgress, None, Family::V6),
            of(Some("eth0.7%2e"), Attach::TcIngress, None, Family::V4),
            of(None, Attach::Netfilter, Some(Hook::Forward), Family::V6),
            of(None, Attach::Netfilter, None, Family::V4),
        ] {
            assert_eq!(SlotName::of_directory(&name.directory()), Some(name));
        }
        for other in ["eth0-xdp-4.lock", "eth0-xdp", "eth0-tap-4", "nowhere-netfilter-4", "eth0.1-xdp-4"] {
            assert_eq!(SlotName::of_directory(other), None, "{other}");
        }
    }

    #[test]
    fn directories_have_no_dots_and_stay_apart() {
        assert_eq!(name("eth0").directory(), "eth0-xdp-4");
        assert_eq!(name("eth0.5").directory(), "eth0%2e5-xdp-4");
        assert_ne!(name("eth0%2e5").directory(), name("eth0.5").directory());
    }
}
