//! Philox4x32-10 (Salmon et al. 2011), a counter-based random number generator. Dropout masks therefore need no state
//! and are the same bits on every target.

/// Multipliers of a round.
pub const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
/// Increments of the key between rounds: the golden ratio and √3 − 1, as fractions of 2³².
pub const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Ten rounds of Philox on a counter, under a key: four random 32-bit words.
pub fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let product = |lane: usize| u64::from(MULTIPLIERS[lane / 2]) * u64::from(counter[lane]);
        let (p0, p1) = (product(0), product(2));
        counter =
            [(p1 >> 32) as u32 ^ counter[1] ^ key[0], p1 as u32, (p0 >> 32) as u32 ^ counter[3] ^ key[1], p0 as u32];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// The random word that decides about one element of a dropout (see `Op::Dropout`). Four neighbouring columns share a
/// counter.
pub fn dropout_word(key: [u32; 2], stream: u32, lead: u32, row: u32, column: u32) -> u32 {
    philox4x32([column / 4, row, lead, stream], key)[column as usize % 4]
}

/// Dropout with rate `p` keeps an element iff its random word is at least this.
pub fn dropout_threshold(p: f64) -> u32 {
    (p * f64::from(u32::MAX) + p) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers from the authors' Random123 library.
    #[test]
    fn known_answers_of_random123() {
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox4x32([!0; 4], [!0; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox4x32([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn the_threshold_is_the_rate_times_2_to_the_32() {
        assert_eq!(dropout_threshold(0.5), 1 << 31);
        assert_eq!(dropout_threshold(0.0), 0);
    }
}
