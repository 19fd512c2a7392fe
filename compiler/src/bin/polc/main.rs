//! The `polc` command.

fn main() {}
