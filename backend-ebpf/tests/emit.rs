//! Emitted programs do what their plans say, and the check VM and the kernel agree on every frame.

mod common;

use common::plans::{Pair, all, eq, linear, plan, range, rule};
use polc_backend_ebpf::vm::Context;
use polc_ir::env::Attach;
use polc_ir::field::Field;
use polc_ir::hook::Family;
use polc_ir::outcome::{Decider, FrameKind};

fn ethernet(ether_type: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    frame.extend(ether_type.to_be_bytes());
    frame.extend(payload);
    frame
}

fn ipv4(proto: u8, frag: u16, options: &[u8], payload: &[u8]) -> Vec<u8> {
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

fn tcp(source: u16, destination: u16, options: &[u8]) -> Vec<u8> {
    let mut header = source.to_be_bytes().to_vec();
    header.extend(destination.to_be_bytes());
    header.extend([0; 8]);
    header.push(((5 + options.len() / 4) << 4) as u8);
    header.push(0x12);
    header.extend([0; 6]);
    header.extend(options);
    header
}

const ATTACHES: [Attach; 3] = [Attach::Xdp, Attach::TcIngress, Attach::TcEgress];

#[test]
fn a_few_rules_in_code() {
    for attach in ATTACHES {
        let fields = [Field::SrcAddr, Field::Proto, Field::DstPort, Field::FragOffset];
        let mut plan = plan(Family::V4, attach, &fields, 4);
        linear(
            &mut plan,
            vec![
                vec![all(&[eq(1, 6), eq(2, 22)]), all(&[eq(3, 0)])],
                vec![all(&[range(2, 1000, 2000)]), all(&[range(0, 0xc000_0000, 0xc000_02ff), eq(1, 6)])],
                vec![all(&[eq(1, 17)])],
                vec![],
            ],
        );
        let mut pair = Pair::new("a few rules", plan);
        let by = |number| Decider::Rule(rule(number));
        let frame = |proto, port, frag| ethernet(0x0800, &ipv4(proto, frag, &[], &tcp(1024, port, &[])));
        assert_eq!(pair.decides(&frame(6, 22, 0)), by(0));
        assert_eq!(pair.decides(&frame(6, 22, 0x2000)), by(0));
        assert_eq!(pair.decides(&frame(6, 22, 5)), by(3));
        assert_eq!(pair.decides(&frame(6, 1000, 0)), by(1));
        assert_eq!(pair.decides(&frame(6, 2000, 0)), by(1));
        assert_eq!(pair.decides(&frame(6, 2001, 0)), by(3));
        assert_eq!(pair.decides(&frame(6, 999, 0)), by(3));
        assert_eq!(pair.decides(&frame(17, 22, 0)), by(2));
        assert_eq!(pair.decides(&ethernet(0x0806, &[0; 40])), Decider::Frame(FrameKind::NotIp));
        assert_eq!(pair.decides(&ethernet(0x86dd, &[0; 40])), Decider::Frame(FrameKind::OtherFamily));
        assert_eq!(pair.decides(&[0; 13]), Decider::Frame(FrameKind::Runt));
        let context = Context { ingress_ifindex: 1, ifindex: 1, ..Context::default() };
        let mut padded = frame(6, 22, 0);
        padded.extend([0; 20]);
        let (ending, bytes) = pair.run_counted(&padded, &context);
        assert_eq!((ending.map(|ending| ending.by), bytes), (Ok(by(0)), 40), "padding is not counted");
    }
}
