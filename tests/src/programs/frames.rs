//! Frames put together by hand, and the random numbers they vary by.

/// A frame of this EtherType.
pub fn ethernet(ether_type: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    frame.extend(ether_type.to_be_bytes());
    frame.extend(payload);
    frame
}

/// An IPv4 packet from 192.0.2.1 to 198.51.100.2; `frag` is the field of flags and offset.
pub fn ipv4(proto: u8, frag: u16, options: &[u8], payload: &[u8]) -> Vec<u8> {
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

/// A TCP header, SYN and ACK.
pub fn tcp(source: u16, destination: u16, options: &[u8]) -> Vec<u8> {
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
pub struct Dice(pub u64);

impl Dice {
    /// 64 bits.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below the bound.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.number() >> 11) as usize % bound
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// So many bytes.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.number() as u8).collect()
    }

    /// One of these.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}
