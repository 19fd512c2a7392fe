//! Counters out of what `iptables-save -c` prints.

/// A rule or a policy and its counters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CounterLine {
    /// The table.
    pub table: String,
    /// The chain.
    pub chain: String,
    /// The rule's place in its chain, from 1; 0 for the chain's policy.
    pub number: u32,
    /// Packets.
    pub packets: u64,
    /// Bytes, from the network header on.
    pub bytes: u64,
}

/// The counters of every rule and every policy, in the order of the text. Lines of other kinds are passed over.
pub fn counter_lines(saved: &str) -> Vec<CounterLine> {
    let mut lines: Vec<CounterLine> = Vec::new();
    let mut table = "";
    // Rules of a chain need not stand together.
    let mut numbers = std::collections::BTreeMap::new();
    for line in saved.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = name;
            numbers.clear();
        } else if let Some(chain) = line.strip_prefix(':') {
            let words: Vec<&str> = chain.split(' ').collect();
            if let [name, policy, counters, ..] = words[..]
                && policy != "-"
                && let Some((packets, bytes)) = pair(counters)
            {
                let (table, chain) = (table.to_string(), name.to_string());
                lines.push(CounterLine { table, chain, number: 0, packets, bytes });
            }
        } else if let Some((counters, rule)) = line.split_once(" -A ")
            && let Some((packets, bytes)) = pair(counters)
        {
            let chain = rule.split(' ').next().unwrap_or("").to_string();
            let number = numbers.entry(chain.clone()).or_insert(0);
            *number += 1;
            lines.push(CounterLine { table: table.to_string(), chain, number: *number, packets, bytes });
        }
    }
    lines
}

/// `[packets:bytes]`.
fn pair(text: &str) -> Option<(u64, u64)> {
    let (packets, bytes) = text.strip_prefix('[')?.strip_suffix(']')?.split_once(':')?;
    Some((packets.parse().ok()?, bytes.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_numbered_within_their_chain() {
        let saved = "# Generated\n*filter\n:INPUT DROP [3:180]\n:u - [0:0]\n[1:60] -A u -j RETURN\n\
                     [2:120] -A INPUT -j u\n[0:0] -A u\nCOMMIT\n*raw\n:OUTPUT ACCEPT [7:8]\n";
        let found = counter_lines(saved);
        let short: Vec<_> = found
            .iter()
            .map(|line| (&line.table[..], &line.chain[..], line.number, line.packets, line.bytes))
            .collect();
        assert_eq!(
            short,
            [
                ("filter", "INPUT", 0, 3, 180),
                ("filter", "u", 1, 1, 60),
                ("filter", "INPUT", 1, 2, 120),
                ("filter", "u", 2, 0, 0),
                ("raw", "OUTPUT", 0, 7, 8),
            ]
        );
    }
}
