//! Makes a running kernel agree with a polc object.
//!
//! This crate will load, attach, swap and watch the objects that [`polc_backend_ebpf`] writes. It is to know objects
//! only: what a rule is stays above it. It exports nothing yet, and no other crate calls it: polc's objects are
//! standard BPF ELF files, so `bpftool`, `ip link set xdp`, `tc filter add` and aya load and attach them without it.
//! What is planned, one room each:
//!
//! | room | what it is to own |
//! | --- | --- |
//! | `probe` | what the running kernel can do |
//! | `sys` | the raw bpf(2) calls, the only `unsafe` code here, with a fake for tests |
//! | `load`, `attach`, `pin` | an object into the kernel, onto a device, kept across restarts |
//! | `tables` | filling and changing table contents |
//! | `swap` | atomic replacement and roll-back |
//! | `coexist` | living beside other programs on one device, and beside the kernel's own rules |
//! | `status`, `counters`, `events` | reading back |
