//! Pure decisions: names and tags, criteria and their choice, a volume's
//! specification, and what a logical volume's tags make of it. No I/O, no clock.

pub mod names;
pub mod record;
pub mod select;
pub mod spec;
pub mod units;
