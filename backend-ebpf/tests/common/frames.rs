//! Frames put together by hand, and the random numbers they vary by.

#![allow(dead_code, reason = "each test binary uses a part")]

pub(crate) fn ethernet(ether_type: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    frame.extend(ether_type.to_be_bytes());
    frame.extend(payload);
    frame
}

pub(crate) fn ipv4(proto: u8, frag: u16, options: &[u8], payload: &[u8]) -> Vec<u8> {
    let ihl = 5 + options.len() / 4;
    let total = ihl * 4 + payload.len();
    let mut packet = vec![0x40 | ihl as u8, 0x12];
    packet.extend((total as u16).to_be_bytes());
    packet.extend([0, 7]);
    packet.extend(frag.to_be_bytes());
    packet.extend([63, proto, 0, 0, 192, 0, 2, 1, 198, 51, 100, 2]);
    packet.extend(options);
    packet.extend(payload);
    packet
}

pub(crate) fn tcp(source: u16, destination: u16, options: &[u8]) -> Vec<u8> {
    let mut header = source.to_be_bytes().to_vec();
    header.extend(destination.to_be_bytes());
    header.extend([0; 8]);
    header.push(((5 + options.len() / 4) << 4) as u8);
    header.push(0x12);
    header.extend([0; 6]);
    header.extend(options);
    header
}

/// A small generator of test bytes (xorshift); the same for every run.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() >> 11) as usize % bound
    }

    pub(crate) fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}
