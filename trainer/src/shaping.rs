//! Reward shaping: the penalty on responses that come close to the longest allowed (DAPO, 2503.14476).

/// What is added to the reward of a response of `length` tokens, the end-of-text token included, where
/// `max_length` are allowed: 0 up to `buffer` tokens before that, from there on linearly down to
/// `-factor` at the longest. A buffer of 0 penalises nothing.
///
/// ```
/// use trainer::shaping::overlong_penalty;
/// let penalty = |length| overlong_penalty(length, 1024, 256, 0.5);
/// assert_eq!([768, 896, 1024].map(penalty), [0.0, -0.25, -0.5]);
/// assert_eq!(overlong_penalty(10, 10, 0, 1.0), 0.0);
/// ```
pub fn overlong_penalty(length: usize, max_length: usize, buffer: usize, factor: f64) -> f64 {
    let over = length as f64 - (max_length as f64 - buffer as f64);
    if buffer == 0 || over <= 0.0 { 0.0 } else { -over / buffer as f64 * factor }
}
