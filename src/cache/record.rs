//! What a logical volume's tags make of it.
