//! Kubernetes policy and Service objects to the polc IR.
//!
//! This crate will turn a cluster `Snapshot` (NetworkPolicy, ClusterNetworkPolicy, Service and EndpointSlice objects,
//! nodes and pods) into one node's [`polc_ir::ruleset::Ruleset`]. It is to read manifests and snapshots only: talking
//! to an API server is not its business, and neither is anything below the IR.
//!
//! It exports nothing yet, and no other crate calls it: the iptables front end comes first, because the IR's meaning is
//! netfilter's and has to be settled on netfilter's own input. What is planned, one room each:
//!
//! | room | what it is to own |
//! | --- | --- |
//! | `manifest` | YAML to typed objects, unknown fields diagnosed |
//! | `snapshot` | the cluster's state that a node's policy depends on |
//! | `selector` | label selectors and their evaluation |
//! | `netpol`, `adminpol` | NetworkPolicy and the tiers of ClusterNetworkPolicy to chains |
//! | `service` | Services and EndpointSlices to backend selection |
//! | `identity` | pods and namespaces as classes of addresses |
//! | `lower` | all of it to a `Ruleset` |
//!
//! What it needs of the IR is there: chains and policies for NetworkPolicy's isolation, `Continue` rules for the tiers'
//! Pass, sets for selectors.
