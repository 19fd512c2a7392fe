//! `polc top`: the rules that count, by how much, on a terminal.

use std::io::{self, IsTerminal as _};
use std::os::fd::AsFd as _;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use polc_loader::Error;
use polc_loader::counters::{self, Counter, Verdicts};
use polc_loader::status::Open;
use polc_loader::sys::Sys;
use ratatui::DefaultTerminal;
use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Cell, Paragraph, Row, Table, TableState};

use super::applied::{self, Followed};
use super::{counted, live};
use crate::cli::TopArgs;
use crate::failure::Failure;
use crate::output::Output;

/// How long a key or a signal may have to wait.
const TICK: Duration = Duration::from_millis(100);
/// Names of the keys, in the last line.
const KEYS: &str = "q quit   s sort   i idle rules   p pause   arrows, PgUp, PgDn, Home, End scroll";

pub(super) fn run(args: &TopArgs, output: &Output) -> Result<ExitCode, Failure> {
    if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
        return Err(Failure::Usage(
            "polc top needs a terminal; `polc status` prints packets a second, `polc save -c` the counters of every rule"
                .into(),
        ));
    }
    let sys = Sys::new();
    let mut followed = Followed::default();
    let mut screen = Screen::new(Duration::from_millis(args.interval.into()));
    screen.read(&sys, &applied::open_some(&sys, &args.slots, output)?.policies)?;
    let signals = sys.signals().map_err(Error::call("wait for signals"))?;
    let what = || Error::call("use the terminal");
    let mut terminal = ratatui::try_init().map_err(what())?;
    let mut show = |terminal: &mut DefaultTerminal| -> Result<(), Failure> {
        let mut read = Instant::now();
        loop {
            terminal.draw(|frame| screen.draw(frame)).map_err(what())?;
            let until = (read + screen.interval).saturating_duration_since(Instant::now()).min(TICK);
            let (keys, shown_on) = (io::stdin(), io::stdout());
            let asked = sys.wait_readable(&[signals.as_fd(), keys.as_fd()], Some(shown_on.as_fd()), until);
            // A terminal that hung up has no more keys, and reading one would be tried for ever.
            let asked = asked.map_err(Error::call("wait for keys and signals"))?;
            if asked[0] || asked[2] {
                return Ok(());
            }
            if event::poll(Duration::ZERO).map_err(what())?
                && let Event::Key(key) = event::read().map_err(what())?
                && key.kind == KeyEventKind::Press
                && screen.press(key) == After::Quit
            {
                return Ok(());
            }
            if read.elapsed() >= screen.interval && !screen.paused {
                read = Instant::now();
                screen.read(&sys, &followed.refresh(&sys, &args.slots)?.policies)?;
                if screen.rows.is_empty() {
                    return Err(live::nothing(&sys, &args.slots));
                }
            }
        }
    };
    let shown = show(&mut terminal);
    ratatui::restore();
    shown.map(|()| ExitCode::SUCCESS)
}

/// What follows a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum After {
    Stay,
    Quit,
}

/// A rule or a policy.
#[derive(Clone, Debug, PartialEq)]
struct Counts {
    /// The policy's place and what it counts in, which together tell it from the others.
    place: String,
    rule: String,
    text: String,
    total: Counter,
    packets_per_second: f64,
    bytes_per_second: f64,
}

/// What rows are sorted by, the largest first, but for the rules' own order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    PacketRate,
    ByteRate,
    Packets,
    Bytes,
    Rules,
}

impl Order {
    /// In the order in which a key goes through them.
    const ALL: [Order; 5] = [Order::PacketRate, Order::ByteRate, Order::Packets, Order::Bytes, Order::Rules];

    fn next(self) -> Order {
        let at = Order::ALL.iter().position(|order| *order == self).expect("all are listed");
        Order::ALL[(at + 1) % Order::ALL.len()]
    }

    /// The heading of the column.
    const fn heading(self) -> &'static str {
        match self {
            Order::PacketRate => "packets/s",
            Order::ByteRate => "bytes/s",
            Order::Packets => "packets",
            Order::Bytes => "bytes",
            Order::Rules => "rule",
        }
    }

    fn sort(self, rows: &mut [&Counts]) {
        let key = |row: &Counts| match self {
            Order::PacketRate => row.packets_per_second,
            Order::ByteRate => row.bytes_per_second,
            Order::Packets => row.total.packets as f64,
            Order::Bytes => row.total.bytes as f64,
            Order::Rules => 0.0,
        };
        // Rows without a difference keep the rules' order.
        rows.sort_by(|a, b| key(b).total_cmp(&key(a)));
    }
}

/// All that is on the screen.
#[derive(Debug)]
struct Screen {
    interval: Duration,
    rows: Vec<Counts>,
    policies: Vec<String>,
    /// Totals by verdict at the last reading, and packets a second between the last two.
    verdicts: Vec<(&'static str, Counter, f64)>,
    read_at: Option<Instant>,
    order: Order,
    idle: bool,
    paused: bool,
    table: TableState,
    /// Rows that fit.
    page: usize,
}

impl Screen {
    fn new(interval: Duration) -> Screen {
        Screen {
            interval,
            rows: Vec::new(),
            policies: Vec::new(),
            verdicts: Vec::new(),
            read_at: None,
            order: Order::PacketRate,
            idle: true,
            paused: false,
            table: TableState::default().with_selected(0),
            page: 1,
        }
    }

    /// Reads all counters; rates are those since the last reading.
    fn read(&mut self, sys: &Sys, policies: &[Open]) -> Result<(), Failure> {
        let mut rows = Vec::new();
        let mut verdicts = Verdicts::default();
        for policy in policies {
            let manifest = &policy.object.manifest;
            verdicts = verdicts + counters::by_verdict(manifest, &counters::by_slot(sys, policy)?);
            for (counted, total) in counters::by_rule(sys, policy)? {
                if !applied::is_users(counted) {
                    continue;
                }
                let number = counted.rule.map_or_else(|| "policy".to_string(), |number| number.to_string());
                rows.push(Counts {
                    place: policy.slot.directory(),
                    rule: format!("{} {} {number}", counted.table, counted.chain),
                    text: counted.text.trim().to_string(),
                    total,
                    packets_per_second: 0.0,
                    bytes_per_second: 0.0,
                });
            }
        }
        let source = |policy: &Open| format!("{}: {}", policy.slot, policy.generation.source);
        self.policies = policies.iter().map(source).collect();
        let now = Instant::now();
        let elapsed = self.read_at.map(|before| now - before);
        self.read_at = Some(now);
        self.update(rows, verdicts, elapsed);
        Ok(())
    }

    /// Puts a reading in place of the one before, `elapsed` ago.
    fn update(&mut self, mut rows: Vec<Counts>, verdicts: Verdicts, elapsed: Option<Duration>) {
        let seconds = elapsed.map_or(f64::INFINITY, |elapsed| elapsed.as_secs_f64().max(1e-9));
        let before = std::mem::take(&mut self.rows);
        // Without a change of policies the rows are the same ones in the same order.
        for (index, row) in rows.iter_mut().enumerate() {
            let same =
                |old: &&Counts| (&old.place, &old.rule, &old.text) == (&row.place, &row.rule, &row.text);
            let Some(old) = before.get(index).filter(same) else { continue };
            let grown = row.total.since(old.total);
            row.packets_per_second = grown.packets as f64 / seconds;
            row.bytes_per_second = grown.bytes as f64 / seconds;
        }
        let old = std::mem::take(&mut self.verdicts);
        for (index, (verdict, total)) in verdicts.named().into_iter().enumerate() {
            let grown = old.get(index).map_or(0, |(_, old, _)| total.since(*old).packets);
            self.verdicts.push((verdict, total, grown as f64 / seconds));
        }
        self.rows = rows;
    }

    /// The rows to be shown, sorted.
    fn shown(&self) -> Vec<&Counts> {
        let mut shown: Vec<&Counts> =
            self.rows.iter().filter(|row| self.idle || row.packets_per_second > 0.0).collect();
        self.order.sort(&mut shown);
        shown
    }

    fn press(&mut self, key: KeyEvent) -> After {
        let last = self.shown().len().saturating_sub(1);
        let at = self.table.selected().unwrap_or(0).min(last);
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        let to = match key.code {
            KeyCode::Char('c') if control => return After::Quit,
            KeyCode::Char('q') | KeyCode::Esc => return After::Quit,
            KeyCode::Char('s') => {
                self.order = self.order.next();
                0
            }
            KeyCode::Char('i') => {
                self.idle = !self.idle;
                0
            }
            KeyCode::Char('p') => {
                self.paused = !self.paused;
                at
            }
            KeyCode::Down => (at + 1).min(last),
            KeyCode::Up => at.saturating_sub(1),
            KeyCode::PageDown => (at + self.page).min(last),
            KeyCode::PageUp => at.saturating_sub(self.page),
            KeyCode::Home => 0,
            KeyCode::End => last,
            _ => at,
        };
        self.table.select(Some(to));
        After::Stay
    }

    fn draw(&mut self, frame: &mut Frame<'_>) {
        let [head, middle, keys] =
            Layout::vertical([Constraint::Length(3), Constraint::Fill(1), Constraint::Length(1)])
                .areas(frame.area());
        let bold = Style::new().add_modifier(Modifier::BOLD);
        let rates: Vec<String> = self
            .verdicts
            .iter()
            .filter(|(_, total, _)| total.packets > 0)
            .map(|(verdict, total, rate)| format!("{verdict} {} packets, {rate:.0}/s", total.packets))
            .collect();
        let paused = if self.paused { ", paused" } else { "" };
        frame.render_widget(
            Paragraph::new(vec![
                Line::styled(self.policies.join(", "), bold),
                Line::from(rates.join("   ")),
                Line::from(format!(
                    "{}, by {}, every {:.1} s{paused}",
                    counted(self.rows.len(), "rule"),
                    self.order.heading(),
                    self.interval.as_secs_f64()
                )),
            ]),
            head,
        );
        let rows: Vec<Row<'_>> = self
            .shown()
            .into_iter()
            .map(|row| {
                let number = |text: String| Cell::from(Line::from(text).right_aligned());
                Row::new([
                    number(format!("{:.0}", row.packets_per_second)),
                    number(format!("{:.0}", row.bytes_per_second)),
                    number(row.total.packets.to_string()),
                    number(row.total.bytes.to_string()),
                    Cell::from(if self.policies.len() > 1 {
                        format!("{} {}", row.place, row.rule)
                    } else {
                        row.rule.clone()
                    }),
                    Cell::from(row.text.clone()),
                ])
            })
            .collect();
        let rule_width = if self.policies.len() > 1 { 36 } else { 24 };
        let heading = |order: Order| {
            let style = if order == self.order { bold.add_modifier(Modifier::REVERSED) } else { bold };
            let line = Line::styled(order.heading(), style);
            Cell::from(if order == Order::Rules { line } else { line.right_aligned() })
        };
        let headings: Vec<Cell<'_>> =
            Order::ALL.into_iter().map(heading).chain([Cell::from(Line::styled("text", bold))]).collect();
        let widths = [
            Constraint::Length(10),
            Constraint::Length(12),
            Constraint::Length(12),
            Constraint::Length(15),
            Constraint::Length(rule_width),
            Constraint::Fill(1),
        ];
        let table = Table::new(rows, widths)
            .header(Row::new(headings))
            .row_highlight_style(Style::new().add_modifier(Modifier::UNDERLINED));
        self.page = usize::from(middle.height.saturating_sub(2)).max(1);
        frame.render_stateful_widget(table, middle, &mut self.table);
        frame.render_widget(Paragraph::new(KEYS), keys);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn rows(packets: &[u64]) -> Vec<Counts> {
        let row = |(index, packets): (usize, &u64)| Counts {
            place: "eth0-xdp-4".into(),
            rule: format!("filter INPUT {}", index + 1),
            text: format!("-A INPUT -p tcp --dport {} -j DROP", index + 1),
            total: Counter { packets: *packets, bytes: 100 * packets },
            packets_per_second: 0.0,
            bytes_per_second: 0.0,
        };
        packets.iter().enumerate().map(row).collect()
    }

    fn screen(readings: &[&[u64]]) -> Screen {
        let mut screen = Screen::new(Duration::from_secs(1));
        screen.policies = vec!["at xdp of `eth0` for IPv4: rules.v4".into()];
        for (index, reading) in readings.iter().enumerate() {
            let elapsed = (index > 0).then_some(Duration::from_secs(2));
            let total = Counter { packets: reading.iter().sum(), bytes: 0 };
            screen.update(rows(reading), Verdicts { drop: total, ..Verdicts::default() }, elapsed);
        }
        screen
    }

    fn lines(screen: &mut Screen) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(120, 8)).unwrap();
        terminal.draw(|frame| screen.draw(frame)).unwrap();
        let buffer = terminal.backend().buffer().clone();
        let line = |row: usize| -> String {
            buffer.content.chunks(120).nth(row).unwrap().iter().map(|cell| cell.symbol()).collect()
        };
        (0..8).map(|row| line(row).trim_end().to_string()).collect()
    }

    fn press(screen: &mut Screen, code: KeyCode) -> After {
        screen.press(KeyEvent::new(code, KeyModifiers::NONE))
    }

    #[test]
    fn the_busiest_rule_comes_first() {
        let mut screen = screen(&[&[100, 10, 0], &[102, 50, 0]]);
        let shown = lines(&mut screen);
        assert_eq!(shown[0], "at xdp of `eth0` for IPv4: rules.v4");
        assert_eq!(shown[1], "drop 152 packets, 21/s");
        assert_eq!(shown[2], "3 rules, by packets/s, every 1.0 s");
        let rule = |line: &str| line.split("filter INPUT ").nth(1).unwrap()[..1].to_string();
        assert_eq!([rule(&shown[4]), rule(&shown[5]), rule(&shown[6])], ["2", "1", "3"]);
        let words: Vec<&str> = shown[4].split_whitespace().collect();
        assert_eq!(words[..4], ["20", "2000", "50", "5000"]);
        assert_eq!(shown[7], KEYS);
    }

    #[test]
    fn keys_sort_hide_scroll_and_end() {
        let mut screen = screen(&[&[100, 10, 0], &[102, 50, 0]]);
        for heading in ["bytes/s", "packets", "bytes", "rule", "packets/s"] {
            press(&mut screen, KeyCode::Char('s'));
            assert!(lines(&mut screen)[2].contains(&format!("by {heading},")));
        }
        press(&mut screen, KeyCode::End);
        assert_eq!(screen.table.selected(), Some(2));
        press(&mut screen, KeyCode::Down);
        press(&mut screen, KeyCode::PageUp);
        assert_eq!(screen.table.selected(), Some(0));
        press(&mut screen, KeyCode::Char('i'));
        assert_eq!(screen.shown().len(), 2);
        press(&mut screen, KeyCode::Char('p'));
        assert!(lines(&mut screen)[2].ends_with("paused"));
        assert_eq!(press(&mut screen, KeyCode::Char('q')), After::Quit);
        assert_eq!(screen.press(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL)), After::Quit);
    }

    #[test]
    fn a_policy_that_is_replaced_starts_without_rates() {
        let mut screen = screen(&[&[100], &[150]]);
        assert_eq!(screen.rows[0].packets_per_second, 25.0);
        let mut other = rows(&[7]);
        other[0].text = "-A INPUT -j ACCEPT".into();
        screen.update(other, Verdicts::default(), Some(Duration::from_secs(1)));
        assert_eq!(screen.rows[0].packets_per_second, 0.0);
    }
}
