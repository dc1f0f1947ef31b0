//! How far a command is: a bar on a terminal, a line now and then elsewhere.

use std::io::{Write, stderr};
use std::time::{Duration, Instant};

use crate::terminal::{Shown, Terminal};

/// Time between two drawings of a bar.
pub(crate) const REDRAW: Duration = Duration::from_millis(100);
/// Time between two lines.
pub(crate) const RELINE: Duration = Duration::from_secs(10);
/// Cells of a bar.
const WIDTH: usize = 24;

/// Progress towards a known number of things.
pub(crate) struct Progress<'a> {
    terminal: &'a Terminal,
    shown: Shown,
    what: &'static str,
    total: usize,
    begun: Instant,
    drawn: Option<Instant>,
}

impl<'a> Progress<'a> {
    /// Nothing done of `total` things called `what`.
    pub(crate) fn new(terminal: &'a Terminal, what: &'static str, total: usize) -> Self {
        let shown = terminal.progress();
        Self { terminal, shown, what, total, begun: Instant::now(), drawn: None }
    }

    /// Shows that `done` things are done with `tokens` tokens, unless that was shown just now.
    pub(crate) fn update(&mut self, done: usize, tokens: usize) {
        let every = match self.shown {
            Shown::Nothing => return,
            Shown::Bar => REDRAW,
            Shown::Lines => RELINE,
        };
        let last = self.drawn.unwrap_or(self.begun);
        if last.elapsed() >= every {
            self.draw(done, tokens);
        }
    }

    /// Shows the final state.
    pub(crate) fn finish(&mut self, done: usize, tokens: usize) {
        if self.shown != Shown::Nothing {
            self.draw(done, tokens);
        }
        end(self.terminal);
    }

    fn draw(&mut self, done: usize, tokens: usize) {
        self.drawn = Some(Instant::now());
        let rate = tokens as f64 / self.begun.elapsed().as_secs_f64().max(1e-9);
        let text = format!("{done}/{} {}, {rate:.1} tokens/s", self.total, self.what);
        draw(self.terminal, done as f64 / self.total.max(1) as f64, &text);
    }
}

impl Drop for Progress<'_> {
    /// Leaves the cursor on a line of its own when the work ends in the middle.
    fn drop(&mut self) {
        if self.shown == Shown::Bar && self.drawn.is_some_and(|drawn| drawn.elapsed() < REDRAW) {
            let _closed = write!(stderr().lock(), "\r");
        }
    }
}

/// Draws a bar of which `fraction` is full over the line, or logs `text`.
pub(crate) fn draw(terminal: &Terminal, fraction: f64, text: &str) {
    match terminal.progress() {
        Shown::Nothing => {}
        Shown::Lines => terminal.info(text),
        Shown::Bar => {
            let cells = (WIDTH as f64 * fraction.clamp(0.0, 1.0)) as usize;
            let bar = format!("{}{}", "=".repeat(cells), " ".repeat(WIDTH - cells));
            // Without a reader there is nobody left to show it to.
            let _closed = write!(stderr().lock(), "\r[{bar}] {text}\x1b[K");
        }
    }
}

/// Leaves a bar as it is and begins a new line.
pub(crate) fn end(terminal: &Terminal) {
    if terminal.progress() == Shown::Bar {
        let _closed = writeln!(stderr().lock());
    }
}
