//! Downloads a model of a hub id, and shows how far that is.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use engine::model::hub::{HubId, HubSettings};
use hub::{Event, Patience};

use crate::progress::{self, REDRAW, RELINE};
use crate::signals;
use crate::terminal::{Shown, Terminal};

/// Files that are not worth a line of their own have fewer bytes.
const SMALL_BYTES: u64 = 100_000;

/// Downloads what the cache lacks of a model; a signal ends the command at once, the next one resumes.
pub(crate) fn download(
    id: &HubId,
    settings: &HubSettings,
    terminal: &Terminal,
) -> engine::Result<PathBuf> {
    let _at_once = signals::end_at_once();
    let cache = settings.cache.display();
    terminal.info(&format!("downloading {id} from {} into {cache}", settings.endpoint));
    let mut display = Display::new(terminal);
    hub::download(id, settings, &Patience::default(), &mut |event| display.show(event))
}

/// What is on the terminal about the file that is on its way.
struct Display<'a> {
    terminal: &'a Terminal,
    shown: Shown,
    /// Where and when the transfer of this file began.
    begun: (u64, Instant),
    file: String,
    drawn: Instant,
}

impl<'a> Display<'a> {
    fn new(terminal: &'a Terminal) -> Self {
        let now = Instant::now();
        let shown = terminal.progress();
        Self { terminal, shown, begun: (0, now), file: String::new(), drawn: now }
    }

    fn show(&mut self, event: Event<'_>) {
        match event {
            Event::Progress { file, done_bytes, total_bytes } => {
                self.progress(file, done_bytes, total_bytes);
            }
            Event::Waiting { file } => {
                self.terminal.info(&format!("{file}: another process downloads it, waiting"));
            }
            Event::Retry { why, wait } => {
                let wait = wait.as_secs_f64();
                self.terminal.warn(&format!("{why}; trying again in {wait} s"));
            }
        }
    }

    fn progress(&mut self, file: &str, done: u64, total: u64) {
        if self.file != file {
            file.clone_into(&mut self.file);
            (self.begun, self.drawn) = ((done, Instant::now()), Instant::now());
        }
        let whole = done == total;
        let every = if self.shown == Shown::Bar { REDRAW } else { RELINE };
        if total < SMALL_BYTES
            || self.shown == Shown::Nothing
            || (!whole && self.drawn.elapsed() < every)
        {
            return;
        }
        self.drawn = Instant::now();
        let (from, begun) = self.begun;
        let rate = rate(done.saturating_sub(from), begun.elapsed());
        let text = format!("{file}: {:.1}/{:.1} MB, {rate:.1} MB/s", mb(done), mb(total));
        progress::draw(self.terminal, done as f64 / total.max(1) as f64, &text);
        if whole {
            progress::end(self.terminal);
        }
    }
}

fn mb(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

fn rate(bytes: u64, took: Duration) -> f64 {
    mb(bytes) / took.as_secs_f64().max(1e-9)
}
